"""Pooling inside boxes: the ops behind ``mmcv.ops.RoIAlign`` and ``RoIPool``.

``rois`` is ``(K, 5)`` everywhere: the index of the image in the batch, then x1, y1, x2,
y2 in pixels of the input image, of which ``spatial_scale`` makes pixels of the map.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.widen import widen

_MAX_POOL = 0
# Elements of the sample tensor that max pooling may hold at once (64 MB in float32).
_MAX_SAMPLES = 2**24


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Stands in for ``mmcv._ext.roi_align_forward``.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(K, 5)``.
        output: Overwritten, ``(K, C, aligned_height, aligned_width)``.
        argmax_y: For max pooling, overwritten by the row of the winning sample in its
            bin's sampling grid, shaped as ``output``. (The compiled op stores image
            coordinates; these would not survive a half format. Nobody but
            ``roi_align_backward`` reads them.)
        argmax_x: The same for the column.
        aligned_height: Bins per column.
        aligned_width: Bins per row.
        spatial_scale: Pixels of the map per pixel of the image.
        sampling_ratio: Samples per bin and axis; 0 takes ``ceil(bin size)`` of them.
        pool_mode: 0 for the maximum of a bin's samples, 1 for their mean. A bin
            without samples gives 0 in both modes.
        aligned: Whether pixel centres lie at half-integer coordinates.
    """
    output.zero_()
    if output.numel() == 0:
        return
    maps, rois = widen(input), rois.to(widen(input))
    bins = (aligned_height, aligned_width)
    if pool_mode != _MAX_POOL:
        pooled = torch.ops.torchvision.roi_align(
            maps, rois, spatial_scale, *bins, sampling_ratio, aligned
        )
        output.copy_(pooled)
        return
    for chunk, (rows, columns) in _equal_sampling_grids(
        rois, maps.shape[1], bins, spatial_scale, sampling_ratio, aligned
    ):
        # One sample per bin of a grid that is `rows` x `columns` times as fine hits
        # exactly the samples of the coarse bins.
        fine = (bins[0] * rows, bins[1] * columns)
        samples = torch.ops.torchvision.roi_align(
            maps, rois[chunk], spatial_scale, *fine, 1, aligned
        )
        best, winner = _split_bins(samples, rows, columns).max(-1)
        output[chunk] = best.to(output)
        argmax_y[chunk] = winner.div(columns, rounding_mode="floor").to(argmax_y)
        argmax_x[chunk] = winner.remainder(columns).to(argmax_x)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Stands in for ``mmcv._ext.roi_align_backward``.

    Args:
        grad_output: ``(K, C, aligned_height, aligned_width)``.
        rois: ``(K, 5)``.
        argmax_y: As ``roi_align_forward`` left it.
        argmax_x: As ``roi_align_forward`` left it.
        grad_input: Overwritten, ``(B, C, H, W)``.
        aligned_height: Bins per column.
        aligned_width: Bins per row.
        spatial_scale: Pixels of the map per pixel of the image.
        sampling_ratio: Samples per bin and axis; 0 takes ``ceil(bin size)`` of them.
        pool_mode: 0 for maximum, 1 for mean.
        aligned: Whether pixel centres lie at half-integer coordinates.
    """
    grad_input.zero_()
    if grad_output.numel() == 0 or grad_input.numel() == 0:
        return
    grad, rois = widen(grad_output), rois.to(widen(grad_output))
    bins = (aligned_height, aligned_width)
    shape = grad_input.shape
    if pool_mode != _MAX_POOL:
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                grad, rois, spatial_scale, *bins, *shape, sampling_ratio, aligned
            )
        )
        return
    total = torch.zeros_like(grad_input, dtype=grad.dtype)
    for chunk, (rows, columns) in _equal_sampling_grids(
        rois, shape[1], bins, spatial_scale, sampling_ratio, aligned
    ):
        winner = (argmax_y[chunk].long() * columns + argmax_x[chunk].long())[..., None]
        samples = grad.new_zeros(*winner.shape[:-1], rows * columns)
        samples.scatter_(-1, winner, grad[chunk][..., None])
        total += torch.ops.torchvision._roi_align_backward(
            _merge_bins(samples, rows, columns),
            rois[chunk],
            spatial_scale,
            bins[0] * rows,
            bins[1] * columns,
            *shape,
            1,
            aligned,
        )
    grad_input.copy_(total)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Stands in for ``mmcv._ext.roi_pool_forward``.

    mmcv divides the box unrounded and rounds every bin outwards, whereas torchvision's
    ``roi_pool`` rounds the box first. So each bin becomes a box of its own here, whole
    pixels already, which torchvision pools to one value.

    Args:
        input: ``(B, C, H, W)``.
        rois: ``(K, 5)``; x2 and y2 name the last pixel inside.
        output: Overwritten by each bin's maximum, 0 for a bin without pixels,
            ``(K, C, pooled_height, pooled_width)``.
        argmax: Overwritten by the winner's flat position in its map, -1 for none;
            integer, shaped as ``output``.
        pooled_height: Bins per column.
        pooled_width: Bins per row.
        spatial_scale: Pixels of the map per pixel of the image.
    """
    output.zero_()
    argmax.fill_(-1)
    if output.numel() == 0:
        return
    maps, rois = widen(input), rois.to(widen(input))
    height, width = maps.shape[2:]
    x1, x2 = _outward_bins(rois[:, 1], rois[:, 3], spatial_scale, pooled_width, width)
    y1, y2 = _outward_bins(rois[:, 2], rois[:, 4], spatial_scale, pooled_height, height)
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
    output.permute(0, 2, 3, 1)[occupied] = pooled.flatten(1).to(output)
    argmax.permute(0, 2, 3, 1)[occupied] = winner.flatten(1).to(argmax)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Stands in for ``mmcv._ext.roi_pool_backward``.

    Args:
        grad_output: ``(K, C, pooled_height, pooled_width)``.
        rois: ``(K, 5)``.
        argmax: As ``roi_pool_forward`` left it.
        grad_input: Overwritten, ``(B, C, H, W)``.
        pooled_height: Bins per column (``grad_output`` says it too).
        pooled_width: Bins per row (``grad_output`` says it too).
        spatial_scale: Without effect, the winners are known.
    """
    channels, height, width = grad_input.shape[1:]
    grad = widen(grad_output)
    image = rois[:, 0].long()[:, None] * channels
    plane = image + torch.arange(channels, device=rois.device)  # (K, C)
    target = plane[:, :, None, None] * (height * width) + argmax.long()
    valid = argmax >= 0
    total = grad.new_zeros(grad_input.numel())
    total.index_add_(0, target[valid], grad[valid])
    grad_input.copy_(total.view(grad_input.shape))


def _equal_sampling_grids(
    rois: Tensor,
    channels: int,
    bins: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Group boxes by the samples per bin, in chunks that fit in memory.

    Boxes without samples are left out.

    Yields:
        Indices into ``rois``, ``(k,)``, and the rows and columns of the sampling grid.
    """
    if sampling_ratio > 0:
        grids = rois.new_full((len(rois), 2), sampling_ratio, dtype=torch.long)
    else:
        # The shift cancels but for its rounding, on which the ceil below may hang.
        shift = 0.5 if aligned else 0.0
        corners = rois[:, 1:] * spatial_scale - shift
        extent = corners[:, 2:] - corners[:, :2]  # (K, 2) as width, height
        if not aligned:
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
