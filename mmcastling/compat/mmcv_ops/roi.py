"""Pooling inside boxes: the ops behind ``mmcv.ops.RoIAlign`` and ``RoIPool``.

``rois`` is ``(K, 5)`` everywhere: the index of the image in the batch, then x1, y1, x2,
y2 in pixels of the input image, of which ``spatial_scale`` makes pixels of the map.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.calling import register_op, widen
from mmcastling.errors import UnavailableError

_ALIGN = "aligned_height aligned_width spatial_scale sampling_ratio pool_mode aligned"


@register_op(f"input rois output argmax_y argmax_x {_ALIGN}")
def roi_align_forward(op: SimpleNamespace) -> None:
    """Mean (``pool_mode`` 1) of samples in each bin of a box.

    Overwrites ``output``, ``(K, C, aligned_height, aligned_width)``, from ``input``,
    ``(B, C, H, W)``. ``sampling_ratio`` is the number of samples per bin and axis, 0
    for ``ceil(bin size)``; a bin without samples gives 0. ``aligned`` says whether
    pixel centres lie at half-integer coordinates. ``argmax_y`` and ``argmax_x`` serve
    the maximum (0), which no toolbox asks for.
    """
    if op.pool_mode != 1:
        raise UnavailableError(
            "RoIAlign with pool_mode='max' needs an mmcv with compiled ops: use 'avg'"
        )
    op.output.zero_()
    if op.output.numel():
        maps, rois = widen(op.input), op.rois.to(widen(op.input))
        bins = (op.spatial_scale, op.aligned_height, op.aligned_width)
        settings = (*bins, op.sampling_ratio, op.aligned)
        op.output.copy_(torch.ops.torchvision.roi_align(maps, rois, *settings))


@register_op(f"grad_output rois argmax_y argmax_x grad_input {_ALIGN}")
def roi_align_backward(op: SimpleNamespace) -> None:
    """Its gradient: overwrites ``grad_input``, shaped as ``input``."""
    op.grad_input.zero_()
    if op.grad_output.numel() and op.grad_input.numel():
        grad, rois = widen(op.grad_output), op.rois.to(widen(op.grad_output))
        bins = (op.spatial_scale, op.aligned_height, op.aligned_width)
        settings = (*bins, *op.grad_input.shape, op.sampling_ratio, op.aligned)
        backward = torch.ops.torchvision._roi_align_backward
        op.grad_input.copy_(backward(grad, rois, *settings))


@register_op("input rois output argmax pooled_height pooled_width spatial_scale")
def roi_pool_forward(op: SimpleNamespace) -> None:
    """Maximum of each bin of a box, whose x2 and y2 name the last pixel inside.

    Overwrites ``output``, ``(K, C, pooled_height, pooled_width)``, from ``input``,
    ``(B, C, H, W)``, and ``argmax``, shaped as ``output``, with the winner's flat
    position in its map; a bin without pixels gives 0 and -1.

    mmcv divides the box unrounded and rounds every bin outwards, whereas torchvision's
    ``roi_pool`` rounds the box first. So each bin becomes a box of its own here, whole
    pixels already, which torchvision pools to one value.
    """
    op.output.zero_()
    op.argmax.fill_(-1)
    if op.output.numel() == 0:
        return
    maps, rois = widen(op.input), op.rois.to(widen(op.input))
    (height, width), scale = maps.shape[2:], op.spatial_scale
    x1, x2 = _outward_bins(rois[:, 1], rois[:, 3], scale, op.pooled_width, width)
    y1, y2 = _outward_bins(rois[:, 2], rois[:, 4], scale, op.pooled_height, height)
    # (K, pooled_height, pooled_width, 5); the last pixel is part of torchvision's boxes
    bins = torch.stack(
        torch.broadcast_tensors(
            rois[:, 0, None, None],
            x1[:, None, :],
            y1[:, :, None],
            x2[:, None, :] - 1,
            y2[:, :, None] - 1,
        ),
        -1,
    )
    occupied = (x2 > x1)[:, None, :] & (y2 > y1)[:, :, None]
    # (occupied bins, C, 1, 1)
    pooled, winner = torch.ops.torchvision.roi_pool(maps, bins[occupied], 1.0, 1, 1)
    # The channel comes second in `output`; seen as last, bins index it directly.
    op.output.permute(0, 2, 3, 1)[occupied] = pooled.flatten(1).to(op.output)
    op.argmax.permute(0, 2, 3, 1)[occupied] = winner.flatten(1).to(op.argmax)


@register_op(
    "grad_output rois argmax grad_input pooled_height pooled_width spatial_scale"
)
def roi_pool_backward(op: SimpleNamespace) -> None:
    """Its gradient: overwrites ``grad_input``, shaped as ``input``."""
    channels, height, width = op.grad_input.shape[1:]
    grad = widen(op.grad_output)
    image = op.rois[:, 0].long()[:, None] * channels
    plane = image + torch.arange(channels, device=grad.device)  # (K, C)
    target = plane[:, :, None, None] * (height * width) + op.argmax.long()
    valid = op.argmax >= 0
    total = grad.new_zeros(op.grad_input.numel())
    total.index_add_(0, target[valid], grad[valid])
    op.grad_input.copy_(total.view(op.grad_input.shape))


def _outward_bins(
    start: Tensor, last: Tensor, scale: float, bins: int, size: int
) -> tuple[Tensor, Tensor]:
    """First pixel and one past the last of RoIPool's bins on one axis, ``(K, bins)``.

    Both are 0 for boxes without extent. ``start`` and ``last`` are the first and last
    pixel of each box in the image, ``(K,)``; ``size`` the pixels of the map.
    """
    begin = (start * scale)[:, None]
    extent = ((last + 1) * scale)[:, None] - begin
    step = extent / bins
    numbers = torch.arange(bins, device=start.device, dtype=start.dtype)
    low = torch.floor(numbers * step + begin).clamp(0, size)
    high = torch.ceil((numbers + 1) * step + begin).clamp(0, size)
    return low.where(extent > 0, 0), high.where(extent > 0, 0)
