"""Attentions to compare with, behind the same contract as castling."""

from __future__ import annotations

from torch import Tensor, nn

from mmcastling.attention.block import TokenAttention
from mmcastling.attention.mixer import TokenMixer


class SoftmaxMixer(TokenMixer):
    """Softmax attention through torch's fused kernel: what castling replaces.

    With ``local_conv`` and ``norm_output`` it is the control that separates the
    kernel's merit from the convolution's. Arguments as in :class:`TokenMixer`.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class SoftmaxAttention(TokenAttention, SoftmaxMixer):
    """A plain softmax attention block. Arguments as in :class:`TokenAttention`."""
