"""What torch's counter of floating point operations does not know."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count


def extra_formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of products that torch's counter takes for free, from the shapes."""
    aten = torch.ops.aten

    def attention(q, k, v, *args, **kwargs) -> int:
        return sdpa_flop_count(q, k, v)

    formulas = {
        aten.mv: lambda matrix, *_, **__: 2 * prod(matrix),
        aten.addmv: lambda bias, matrix, *_, **__: 2 * prod(matrix),
        aten.dot: lambda vector, *_, **__: 2 * prod(vector),
        aten.vdot: lambda vector, *_, **__: 2 * prod(vector),
        # Unknown to the counter of torch 2.14.
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        # As for fused attention, both products count as dense.
        torch.ops.mmcastling.masked_softmax: attention,
    }
    if torch.backends.mkldnn.is_available():
        mkldnn = torch.ops.mkldnn
        formulas[mkldnn._linear_pointwise] = lambda x, weight, *_, **__: (
            2 * prod(x) * weight[0]
        )
        formulas[mkldnn._convolution_pointwise] = (
            lambda x, weight, *_, out_shape, **__: conv_flop_count(x, weight, out_shape)
        )
    if hasattr(torch.ops.torchvision, "deform_conv2d"):  # where it is imported
        formulas[torch.ops.torchvision.deform_conv2d] = (
            lambda x, weight, *_, out_shape, **__: (
                2 * prod(out_shape) * prod(weight[1:])
            )
        )
    return formulas
