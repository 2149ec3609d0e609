"""Focused linear attention (FLatten-Transformer, Han et al., ICCV 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.functional import kernel_attention, l2_normalize
from mmcastling.attention.local_conv import (
    Grid,
    convolve_on_grid,
    grid_conv,
    merge_heads,
    split_heads,
)
from mmcastling.attention.mixer import TokenMixer
from mmcastling.errors import OptionError


@in_full_precision
def focused_features(x: Tensor, scale: Tensor, *, focus: float = 3) -> Tensor:
    """``f_p(x) = |x| x^p / |x^p|`` of ``x = ReLU(x) / softplus(scale)`` (paper, eq. 5).

    As released, the lengths are taken over all channels, before they are split into
    heads. A row without a positive entry gives zero (the released 1e-6 is not added).
    Of queries or keys ``(..., N, C)`` with a scale ``(C,)`` they are ``(..., N, C)``,
    none negative; ``focus`` is the power ``p``.
    """
    x = x.relu() / nn.functional.softplus(scale)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # The direction comes first: a power of the entries themselves may underflow.
    return length * l2_normalize(l2_normalize(x) ** focus)


class FocusedMixer(TokenMixer):
    """Focused linear attention as a mixer.

    The positional encoding that the released code adds to the keys is left out, since
    it fixes the number of tokens.

    Args:
        num_heads, head_dims, norm_output, key_dims: As in :class:`TokenMixer`.
        local_conv: ``'focused'`` for the paper's own, 5x5 on the grid with kernels
            that the heads share, or as in :class:`TokenMixer`. Defaults to
            ``'focused'``.
        focus: The power ``p`` that sharpens the features, at least 1. Defaults to 3.
    """

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        local_conv: str | dict[str, Any] | None = "focused",
        norm_output: bool = False,
        focus: float = 3,
        key_dims: int | None = None,
    ) -> None:
        own = local_conv == "focused"
        conv = None if own else local_conv
        super().__init__(num_heads, head_dims, conv, norm_output, key_dims)
        self.is_shared = own
        if own:
            self.local_conv, self.uses_grid = grid_conv(head_dims, 5), True
            self.local_conv.bias = nn.Parameter(torch.zeros(head_dims))
        if focus < 1:
            raise OptionError(
                f"focus {focus!r} must be at least 1; below, it would blur the features"
            )
        self.focus = focus
        self.scale = nn.Parameter(torch.zeros(num_heads * self.key_dims))

    def convolve(self, v: Tensor, grid: Grid | None) -> Tensor | None:
        if not self.is_shared:
            return super().convolve(v, grid)
        heads = v.flatten(0, 1).unsqueeze(1)
        return convolve_on_grid(self.local_conv, heads, grid).reshape(v.shape)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel_attention(self._features(q), self._features(k), v)

    def _features(self, x: Tensor) -> Tensor:
        x, heads = merge_heads(x), x.shape[1]  # (B, N, h*d)
        return split_heads(focused_features(x, self.scale, focus=self.focus), heads)
