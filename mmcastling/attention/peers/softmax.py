"""Softmax attention, which castling replaces."""

from __future__ import annotations

from torch import Tensor, nn

from mmcastling.attention.mixer import TokenMixer


class SoftmaxMixer(TokenMixer):
    """Softmax attention through torch's fused kernel.

    With ``local_conv`` and ``norm_output`` it is the control that separates the
    kernel's merit from the convolution's. Arguments as in :class:`TokenMixer`.
    """

    uses_bias = True
    mask_is_on = True  # none of its probabilities is masked

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        bias = None if bias is None else bias.to(q.dtype)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
