"""Efficient attention (Shen et al., WACV 2021): two softmaxes instead of one."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.mixer import TokenMixer


@in_full_precision
def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax_channels(q) (softmax_tokens(k)^T v)``, in O(N).

    The product of the two softmaxes has rows that sum to one, as softmax attention has.
    Queries ``(B, h, N, d)``, keys ``(B, h, M, d)`` and values ``(B, h, M, e)`` give
    ``(B, h, N, e)``; float32 for half-precision inputs.
    """
    context = torch.softmax(k, dim=-2).transpose(-2, -1) @ v  # (B, h, d, e)
    return torch.softmax(q, dim=-1) @ context


class EfficientMixer(TokenMixer):
    """Efficient attention as a mixer. Arguments as in :class:`TokenMixer`."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return efficient_attention(q, k, v)
