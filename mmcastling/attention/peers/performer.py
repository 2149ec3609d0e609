"""Performer's FAVOR+ (Choromanski et al., ICLR 2021): softmax by random features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.mixer import TokenMixer
from mmcastling.errors import OptionError


def orthogonal_directions(num_features: int, dims: int, seed: int = 0) -> Tensor:
    """Gaussian vectors that are orthogonal within each block of ``dims`` of them.

    Each vector alone is distributed as ``N(0, I)``, which keeps the estimate unbiased;
    orthogonality lowers its variance. Returns ``(num_features, dims)``; the global
    generator is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(math.ceil(num_features / dims)):
        q, r = torch.linalg.qr(torch.randn(dims, dims, generator=generator))
        # Uniform over rotations only once the signs that QR leaves open are fixed.
        blocks.append((q * r.diagonal().sign()).T)
    lengths = torch.randn(num_features, dims, generator=generator).norm(dim=1)
    return torch.cat(blocks)[:num_features] * lengths[:, None]


@in_full_precision
def performer_log_features(x: Tensor, directions: Tensor) -> Tensor:
    """Logarithms of the positive random features of the softmax kernel.

    ``phi(x) = exp(w x' - |x'|^2 / 2) / sqrt(m)`` with ``x' = x / d^(1/4)``, so that
    ``<phi(q), phi(k)>`` has the mean ``exp(<q, k> / sqrt(d))``. Of queries or keys
    ``(..., N, d)`` and directions ``(m, d)`` it is ``(..., N, m)``.
    """
    x = x * x.shape[-1] ** -0.25
    half_norm = x.square().sum(dim=-1, keepdim=True) / 2
    logits = x @ directions.to(x.dtype).T  # (..., N, m)
    return logits - half_norm - math.log(directions.shape[0]) / 2


@in_full_precision
def performer_attention(q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> Tensor:
    """Softmax attention with the kernel estimated by random features, in O(N).

    ``sum_r phi_r(q) (sum_j phi_r(k_j) v_j) / sum_r phi_r(q) (sum_j phi_r(k_j))`` is a
    mean of values per feature ``r`` (weights: a softmax over tokens), averaged over
    features (weights: a softmax again). In that form nothing can overflow or divide by
    zero, so no epsilon biases the features.

    Queries ``(B, h, N, d)``, keys ``(B, h, M, d)``, values ``(B, h, M, e)`` and
    directions ``(m, d)`` give ``(B, h, N, e)``; float32 for half-precision inputs.
    """
    q_log = performer_log_features(q, directions)
    k_log = performer_log_features(k, directions)
    means = torch.softmax(k_log, dim=-2).transpose(-2, -1) @ v  # (B, h, m, e)
    mass = torch.logsumexp(k_log, dim=-2, keepdim=True)  # (B, h, 1, m)
    return torch.softmax(q_log + mass, dim=-1) @ means


class PerformerMixer(TokenMixer):
    """FAVOR+ as a mixer. Its random directions are a buffer that checkpoints save.

    Args:
        num_heads, head_dims: As in :class:`TokenMixer`.
        num_features: Random features ``m`` per head, the same ones in every head.
            Defaults to None (``d ln d``, as the paper advises).
        seed: Seed of the features. Defaults to 0.
        **options: Further arguments of :class:`TokenMixer`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        num_features: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(num_heads, head_dims, **options)
        if num_features is None:
            num_features = max(1, round(self.key_dims * math.log(self.key_dims)))
        if num_features < 1:
            raise OptionError(
                f"num_features {num_features!r} must be a positive number of random "
                "features, or None for d ln d of them"
            )
        directions = orthogonal_directions(num_features, self.key_dims, seed)
        self.register_buffer("directions", directions)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return performer_attention(q, k, v, self.directions)
