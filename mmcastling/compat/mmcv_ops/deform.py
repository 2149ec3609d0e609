"""Deformable convolution: the ops behind ``mmcv.ops.deform_conv2d`` and its v2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.widen import widen

_Pair = tuple[int, int]


@dataclass(frozen=True)
class _Geometry:
    """A deformable convolution in torchvision's terms; pairs are (height, width)."""

    stride: _Pair
    padding: _Pair
    dilation: _Pair
    groups: int
    offset_groups: int

    def forward(
        self,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """Overwrite ``output``, ``(B, D, H', W')``."""
        if output.numel() == 0:
            return
        arguments = self._arguments(input, weight, offset, mask, bias)
        output.copy_(torch.ops.torchvision.deform_conv2d(*arguments))

    def backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None,
    ) -> Sequence[Tensor]:
        """Gradients of input, weight, offset, mask and bias, in this order.

        Without a mask the fourth means nothing.
        """
        arguments = self._arguments(input, weight, offset, mask, None)
        if grad_output.numel() == 0:
            return [torch.zeros_like(tensor) for tensor in arguments[:5]]
        return torch.ops.torchvision._deform_conv2d_backward(
            widen(grad_output), *arguments
        )

    def _arguments(
        self,
        input: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> tuple:
        input = widen(input)
        return (
            input,
            widen(weight),
            widen(offset),
            # torchvision wants both tensors even where it does not read them.
            input.new_zeros(len(input), 1) if mask is None else widen(mask),
            input.new_zeros(len(weight)) if bias is None else widen(bias),
            *self.stride,
            *self.padding,
            *self.dilation,
            self.groups,
            self.offset_groups,
            mask is not None,
        )


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution without mask; ``mmcv._ext.deform_conv_forward``.

    Args:
        input: ``(B, C, H, W)``.
        weight: ``(D, C / group, kH, kW)``.
        offset: Row and column shift of every tap in turn,
            ``(B, deformable_group * kH * kW * 2, H', W')``.
        output: Overwritten, ``(B, D, H', W')``.
        columns: Scratch of the compiled op; not used.
        ones: Scratch of the compiled op; not used.
        kW: Kernel width; not used, ``weight`` says it.
        kH: Kernel height; not used.
        dW: Stride along the width.
        dH: Stride along the height.
        padW: Zero padding left and right.
        padH: Zero padding above and below.
        dilationW: Dilation along the width.
        dilationH: Dilation along the height.
        group: Groups of the convolution.
        deformable_group: Groups of channels with offsets of their own.
        im2col_step: Images per step of the compiled op; not used.
    """
    geometry = _Geometry(
        (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    )
    geometry.forward(output, input, weight, offset, None, None)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients of the data; stands in for ``mmcv._ext.deform_conv_backward_input``.

    torchvision computes all gradients at once, so half of this work is repeated by
    :func:`deform_conv_backward_parameters`.

    Args:
        input: ``(B, C, H, W)``.
        offset: ``(B, deformable_group * kH * kW * 2, H', W')``.
        gradOutput: ``(B, D, H', W')``.
        gradInput: Overwritten, shaped as ``input``.
        gradOffset: Overwritten, shaped as ``offset``.
        weight: ``(D, C / group, kH, kW)``.
        columns: Not used; the other arguments are those of
            :func:`deform_conv_forward`.
        kW: See there.
        kH: See there.
        dW: See there.
        dH: See there.
        padW: See there.
        padH: See there.
        dilationW: See there.
        dilationH: See there.
        group: See there.
        deformable_group: See there.
        im2col_step: See there.
    """
    geometry = _Geometry(
        (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    )
    grads = geometry.backward(gradOutput, input, weight, offset, None)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Gradient of the weight; ``mmcv._ext.deform_conv_backward_parameters``.

    Args:
        input: ``(B, C, H, W)``.
        offset: ``(B, deformable_group * kH * kW * 2, H', W')``.
        gradOutput: ``(B, D, H', W')``.
        gradWeight: ``scale`` times the gradient is added to it,
            ``(D, C / group, kH, kW)``.
        columns: Not used; the other arguments are those of
            :func:`deform_conv_forward`.
        ones: See there.
        kW: See there.
        kH: See there.
        dW: See there.
        dH: See there.
        padW: See there.
        padH: See there.
        dilationW: See there.
        dilationH: See there.
        group: See there.
        deformable_group: See there.
        scale: Factor on the gradient.
        im2col_step: See there.
    """
    geometry = _Geometry(
        (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group
    )
    # The gradient of the weight does not depend on the weight, only on its shape.
    grads = geometry.backward(
        gradOutput, input, torch.zeros_like(gradWeight), offset, None
    )
    gradWeight.add_(grads[1].to(gradWeight), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution with mask; ``mmcv._ext.modulated_deform_conv_forward``.

    Args:
        input: ``(B, C, H, W)``.
        weight: ``(D, C / group, kernel_h, kernel_w)``.
        bias: ``(D,)``, or anything if ``with_bias`` is false.
        ones: Scratch of the compiled op; not used.
        offset: ``(B, deformable_group * kernel_h * kernel_w * 2, H', W')``.
        mask: Factor of every tap,
            ``(B, deformable_group * kernel_h * kernel_w, H', W')``.
        output: Overwritten, ``(B, D, H', W')``.
        columns: Scratch of the compiled op; not used.
        kernel_h: Not used, ``weight`` says it.
        kernel_w: Not used.
        stride_h: Stride along the height.
        stride_w: Stride along the width.
        pad_h: Zero padding above and below.
        pad_w: Zero padding left and right.
        dilation_h: Dilation along the height.
        dilation_w: Dilation along the width.
        group: Groups of the convolution.
        deformable_group: Groups of channels with offsets of their own.
        with_bias: Whether there is a bias.
    """
    geometry = _Geometry(
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        group,
        deformable_group,
    )
    geometry.forward(output, input, weight, offset, mask, bias if with_bias else None)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Stands in for ``mmcv._ext.modulated_deform_conv_backward``.

    The ``grad_*`` tensors but ``grad_output`` are overwritten, each shaped as the
    tensor it is named after; ``grad_bias`` only if ``with_bias``. All other arguments
    are those of :func:`modulated_deform_conv_forward`.
    """
    geometry = _Geometry(
        (stride_h, stride_w),
        (pad_h, pad_w),
        (dilation_h, dilation_w),
        group,
        deformable_group,
    )
    grads = geometry.backward(grad_output, input, weight, offset, mask)
    targets = [grad_input, grad_weight, grad_offset, grad_mask, grad_bias]
    for target, grad in zip(targets[: 4 + with_bias], grads, strict=False):
        target.copy_(grad)
