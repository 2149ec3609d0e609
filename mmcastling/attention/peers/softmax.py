"""Softmax attention, which castling replaces."""

from __future__ import annotations

from torch import Tensor, nn

from mmcastling.attention.mixer import TokenMixer


class SoftmaxMixer(TokenMixer):
    """Softmax attention through torch's fused kernel.

    With ``local_conv`` and ``norm_output`` it is the control that separates the
    kernel's merit from the convolution's. Arguments as in :class:`TokenMixer`.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)
