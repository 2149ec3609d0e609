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

    def first_operand(matrix, *args, **kwargs) -> int:
        return 2 * prod(matrix)

    def add_matrix_vector(bias, matrix, *args, **kwargs) -> int:
        return 2 * prod(matrix)

    def attention(q, k, v, *args, **kwargs) -> int:
        return sdpa_flop_count(q, k, v)

    def linear(x, weight, *args, **kwargs) -> int:
        return 2 * prod(x) * weight[0]

    def convolution(x, weight, *args, out_shape=None, **kwargs) -> int:
        return conv_flop_count(x, weight, out_shape)

    def deform_conv2d(x, weight, *args, out_shape=None, **kwargs) -> int:
        return 2 * prod(out_shape) * prod(weight[1:])

    formulas = {
        aten.mv: first_operand,
        aten.addmv: add_matrix_vector,
        aten.dot: first_operand,
        aten.vdot: first_operand,
        # Unknown to the counter of torch 2.14.
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        # As for fused attention, both products count as dense.
        torch.ops.mmcastling.masked_softmax: attention,
    }
    if torch.backends.mkldnn.is_available():
        formulas[torch.ops.mkldnn._linear_pointwise] = linear
        formulas[torch.ops.mkldnn._convolution_pointwise] = convolution
    torchvision = torch.ops.torchvision
    if hasattr(torchvision, "deform_conv2d"):  # only where torchvision is imported
        formulas[torchvision.deform_conv2d] = deform_conv2d
    return formulas
