"""Deformable convolution: the ops behind ``mmcv.ops.deform_conv2d`` and its v2.

Shapes, with ``taps`` for ``deformable_group * kH * kW``: ``input`` is ``(B, C, H, W)``,
``weight`` ``(D, C / group, kH, kW)``, ``offset`` ``(B, taps * 2, H', W')`` with the row
and column shift of every tap in turn, ``mask`` ``(B, taps, H', W')`` with each tap's
factor, ``bias`` ``(D,)``, output and its gradient ``(B, D, H', W')``. Gradients are
overwritten, each shaped as what it is named after. The kernel's size, ``columns``,
``ones`` and ``im2col_step`` serve the compiled ops and are not used.
"""

from collections.abc import Sequence
from operator import attrgetter
from types import SimpleNamespace

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.calling import register_op, widen

_V1 = "kW kH dW dH padW padH dilationW dilationH group deformable_group"
_V2 = (
    "kernel_h kernel_w stride_h stride_w pad_h pad_w dilation_h dilation_w group "
    "deformable_group with_bias"
)


# Strides and so on as torchvision's operator takes them.
_geometry_v1 = attrgetter(
    *("dH", "dW", "padH", "padW", "dilationH", "dilationW"),
    *("group", "deformable_group"),
)
_geometry_v2 = attrgetter(
    *("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
    *("group", "deformable_group"),
)


def _arguments(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple:
    input = widen(input)
    return (
        input,
        widen(weight),
        widen(offset),
        # torchvision wants both tensors even where it does not read them.
        input.new_zeros(len(input), 1) if mask is None else widen(mask),
        input.new_zeros(len(weight)) if bias is None else widen(bias),
        *geometry,
        mask is not None,
    )


def _forward(output: Tensor, *arguments) -> None:
    if output.numel():
        result = torch.ops.torchvision.deform_conv2d(*_arguments(*arguments))
        output.copy_(result)


def _backward(grad_output: Tensor, *arguments) -> Sequence[Tensor]:
    """Gradients of input, weight, offset, mask (if there is one) and bias."""
    given = _arguments(*arguments)
    if grad_output.numel() == 0:
        return [torch.zeros_like(tensor) for tensor in given[:5]]
    return torch.ops.torchvision._deform_conv2d_backward(widen(grad_output), *given)


@register_op(f"input weight offset output columns ones {_V1} im2col_step")
def deform_conv_forward(op: SimpleNamespace) -> None:
    """Without mask; overwrites ``output``."""
    geometry = _geometry_v1(op)
    _forward(op.output, op.input, op.weight, op.offset, None, None, geometry)


@register_op(
    f"input offset gradOutput gradInput gradOffset weight columns {_V1} im2col_step"
)
def deform_conv_backward_input(op: SimpleNamespace) -> None:
    """Gradients of the data.

    torchvision computes all gradients at once, so half of this work is repeated by
    :func:`deform_conv_backward_parameters`.
    """
    arguments = (op.input, op.weight, op.offset, None, None, _geometry_v1(op))
    grads = _backward(op.gradOutput, *arguments)
    op.gradInput.copy_(grads[0])
    op.gradOffset.copy_(grads[2])


@register_op(f"input offset gradOutput gradWeight columns ones {_V1} scale im2col_step")
def deform_conv_backward_parameters(op: SimpleNamespace) -> None:
    """Gradient of the weight: ``scale`` times it is added to ``gradWeight``."""
    # It does not depend on the weight, only on its shape.
    weight = torch.zeros_like(op.gradWeight)
    arguments = (op.input, weight, op.offset, None, None, _geometry_v1(op))
    grads = _backward(op.gradOutput, *arguments)
    op.gradWeight.add_(grads[1].to(op.gradWeight), alpha=op.scale)


@register_op(f"input weight bias ones offset mask output columns {_V2}")
def modulated_deform_conv_forward(op: SimpleNamespace) -> None:
    """With mask, and a bias where ``with_bias`` says so; overwrites ``output``."""
    bias = op.bias if op.with_bias else None
    geometry = _geometry_v2(op)
    _forward(op.output, op.input, op.weight, op.offset, op.mask, bias, geometry)


@register_op(
    "input weight bias ones offset mask columns grad_input grad_weight grad_bias "
    f"grad_offset grad_mask grad_output {_V2}"
)
def modulated_deform_conv_backward(op: SimpleNamespace) -> None:
    """All gradients with mask, ``grad_bias`` only where ``with_bias`` says so."""
    arguments = (op.input, op.weight, op.offset, op.mask, None, _geometry_v2(op))
    grads = _backward(op.grad_output, *arguments)
    targets = [op.grad_input, op.grad_weight, op.grad_offset, op.grad_mask]
    if op.with_bias:
        targets.append(op.grad_bias)
    for target, grad in zip(targets, grads, strict=False):
        target.copy_(grad)
