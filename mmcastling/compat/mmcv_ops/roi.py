"""Pooling inside boxes: the ops behind ``mmcv.ops.RoIAlign`` and ``RoIPool``.

``rois`` is ``(K, 5)`` everywhere: the index of the image in the batch, then x1, y1, x2,
y2 in pixels of the input image, of which ``spatial_scale`` makes pixels of the map.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.calling import register_op, widen

_MAX_POOL = 0
# Elements of the sample tensor that max pooling may hold at once (64 MB in float32).
_MAX_SAMPLES = 2**24


_ALIGN = "aligned_height aligned_width spatial_scale sampling_ratio pool_mode aligned"


@register_op(f"input rois output argmax_y argmax_x {_ALIGN}")
def roi_align_forward(op: SimpleNamespace) -> None:
    """Maximum (``pool_mode`` 0) or mean (1) of samples in each bin of a box.

    Overwrites ``output``, ``(K, C, aligned_height, aligned_width)``, from ``input``,
    ``(B, C, H, W)``. ``sampling_ratio`` is the number of samples per bin and axis, 0
    for ``ceil(bin size)``; a bin without samples gives 0. ``aligned`` says whether
    pixel centres lie at half-integer coordinates.

    For the maximum ``argmax_y`` and ``argmax_x``, shaped as ``output``, are overwritten
    by the row and column of the winner in its bin's sampling grid. (The compiled op
    stores image coordinates; these would not survive a half format. Nobody but
    ``roi_align_backward`` reads them.)
    """
    op.output.zero_()
    if op.output.numel() == 0:
        return
    maps, rois = widen(op.input), op.rois.to(widen(op.input))
    bins = (op.aligned_height, op.aligned_width)
    if op.pool_mode != _MAX_POOL:
        pooled = torch.ops.torchvision.roi_align(
            maps, rois, op.spatial_scale, *bins, op.sampling_ratio, op.aligned
        )
        op.output.copy_(pooled)
        return
    for chunk, (rows, columns) in _equal_sampling_grids(op, rois, maps.shape[1]):
        # One sample per bin of a grid that is `rows` x `columns` times as fine hits
        # exactly the samples of the coarse bins.
        fine = (bins[0] * rows, bins[1] * columns)
        samples = torch.ops.torchvision.roi_align(
            maps, rois[chunk], op.spatial_scale, *fine, 1, op.aligned
        )
        best, winner = _split_bins(samples, rows, columns).max(-1)
        op.output[chunk] = best.to(op.output)
        row = winner.div(columns, rounding_mode="floor")
        op.argmax_y[chunk] = row.to(op.argmax_y)
        op.argmax_x[chunk] = winner.remainder(columns).to(op.argmax_x)


@register_op(f"grad_output rois argmax_y argmax_x grad_input {_ALIGN}")
def roi_align_backward(op: SimpleNamespace) -> None:
    """Its gradient: overwrites ``grad_input``, shaped as ``input``."""
    op.grad_input.zero_()
    if op.grad_output.numel() == 0 or op.grad_input.numel() == 0:
        return
    grad, rois = widen(op.grad_output), op.rois.to(widen(op.grad_output))
    bins = (op.aligned_height, op.aligned_width)
    shape = op.grad_input.shape
    backward = torch.ops.torchvision._roi_align_backward
    if op.pool_mode != _MAX_POOL:
        settings = (op.spatial_scale, *bins, *shape, op.sampling_ratio, op.aligned)
        op.grad_input.copy_(backward(grad, rois, *settings))
        return
    total = torch.zeros_like(op.grad_input, dtype=grad.dtype)
    for chunk, (rows, columns) in _equal_sampling_grids(op, rois, shape[1]):
        row, column = op.argmax_y[chunk].long(), op.argmax_x[chunk].long()
        samples = grad.new_zeros(*row.shape, rows * columns)
        samples.scatter_(
            -1, (row * columns + column)[..., None], grad[chunk][..., None]
        )
        fine = (bins[0] * rows, bins[1] * columns)
        total += backward(
            _merge_bins(samples, rows, columns),
            rois[chunk],
            *(op.spatial_scale, *fine, *shape, 1, op.aligned),
        )
    op.grad_input.copy_(total)


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


def _equal_sampling_grids(
    op: SimpleNamespace, rois: Tensor, channels: int
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Group boxes by the samples per bin, in chunks that fit in memory.

    Boxes without samples are left out.

    Yields:
        Indices into ``rois``, ``(k,)``, and the rows and columns of the sampling grid.
    """
    bins = (op.aligned_height, op.aligned_width)
    if op.sampling_ratio > 0:
        grids = rois.new_full((len(rois), 2), op.sampling_ratio, dtype=torch.long)
    else:
        # The shift cancels but for its rounding, on which the ceil below may hang.
        shift = 0.5 if op.aligned else 0.0
        corners = rois[:, 1:] * op.spatial_scale - shift
        extent = corners[:, 2:] - corners[:, :2]  # (K, 2) as width, height
        if not op.aligned:
            extent = extent.clamp(min=1)
        grids = torch.ceil(extent.flip(1) / extent.new_tensor(bins)).long()
    kinds, group = grids.unique(dim=0, return_inverse=True)
    for number, (rows, columns) in enumerate(kinds.tolist()):
        if rows <= 0 or columns <= 0:
            continue
        members = (group == number).nonzero()[:, 0]
        per_roi = channels * bins[0] * rows * bins[1] * columns
        for chunk in members.split(max(1, _MAX_SAMPLES // per_roi)):
            yield chunk, (rows, columns)


def _split_bins(samples: Tensor, rows: int, columns: int) -> Tensor:
    """``(K, C, ph * rows, pw * columns)`` to ``(K, C, ph, pw, rows * columns)``."""
    split = samples.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return split.transpose(3, 4).flatten(4)


def _merge_bins(samples: Tensor, rows: int, columns: int) -> Tensor:
    """Undo :func:`_split_bins`."""
    split = samples.unflatten(4, (rows, columns)).transpose(3, 4)
    return split.flatten(4).flatten(2, 3)


def _outward_bins(
    start: Tensor, last: Tensor, scale: float, bins: int, size: int
) -> tuple[Tensor, Tensor]:
    """Whole-pixel bounds of RoIPool's bins along one axis.

    Args:
        start: First pixel of each box, in the image, ``(K,)``.
        last: Last pixel of each box, ``(K,)``.
        scale: Pixels of the map per pixel of the image.
        bins: Number of bins.
        size: Pixels of the map along this axis.

    Returns:
        First pixel and one past the last pixel of each bin, ``(K, bins)`` each, both 0
        for boxes without extent.
    """
    begin = (start * scale)[:, None]
    extent = ((last + 1) * scale)[:, None] - begin
    step = extent / bins
    numbers = torch.arange(bins, device=start.device, dtype=start.dtype)
    low = torch.floor(numbers * step + begin).clamp(0, size)
    high = torch.ceil((numbers + 1) * step + begin).clamp(0, size)
    return low.where(extent > 0, 0), high.where(extent > 0, 0)
