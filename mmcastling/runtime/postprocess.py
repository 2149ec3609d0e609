"""From raw outputs to what is in the image, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def paste_masks(
    masks: np.ndarray,
    boxes: np.ndarray,
    size: tuple[int, int],
    threshold: float = 0.5,
) -> np.ndarray:
    """Masks of boxes ``(N, 4)`` as masks of the whole image, bool ``(N, *size)``.

    Each pixel of the image that a box covers takes the probability at its centre,
    interpolated bilinearly between the centres of the mask's cells ``(N, h, w)`` and
    fading to zero half a cell outside of them, as mmdet's mask head does it. A mask is
    where that is at least ``threshold``.
    """
    pasted = np.zeros((len(boxes), *size), dtype=bool)
    for index, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        rows, along_y = _samples(box[1], box[3], mask.shape[0], size[0])
        columns, along_x = _samples(box[0], box[2], mask.shape[1], size[1])
        values = along_y @ mask.astype(np.float32) @ along_x.T
        pasted[index, rows, columns] = values >= threshold
    return pasted


def _samples(
    start: float, end: float, cells: int, length: int
) -> tuple[slice, np.ndarray]:
    """Pixels that an interval touches, and the cells' weights in each of them."""
    first = int(max(np.floor(start) - 1, 0))
    last = int(max(min(np.ceil(end) + 1, length), first))
    centres = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        position = (centres - np.float32(start)) / (np.float32(end) - np.float32(start))
    position = position * 2 - 1
    position = np.where(np.isfinite(position), position, 0.0)  # a box without width
    position = ((position + 1) * cells - 1) / 2  # in cells, centres at whole numbers
    distance = np.abs(position[:, None] - np.arange(cells, dtype=np.float32))
    return slice(first, last), np.maximum(1 - distance, 0).astype(np.float32)


def resize_bilinear(
    values: np.ndarray, size: tuple[int, int], align_corners: bool = False
) -> np.ndarray:
    """Interpolate maps ``(C, H, W)`` to ``(C, *size)``, as torch does it."""
    for axis, target in ((1, size[0]), (2, size[1])):
        length = values.shape[axis]
        if length == target:
            continue
        steps = np.arange(target, dtype=np.float32)
        if align_corners:
            position = steps * np.float32((length - 1) / max(target - 1, 1))
        else:
            position = (steps + np.float32(0.5)) * np.float32(length / target)
            position = np.maximum(position - np.float32(0.5), 0)
        low = np.minimum(position.astype(np.int64), length - 1)
        high = np.minimum(low + 1, length - 1)
        shape = [1, 1, 1]
        shape[axis] = target
        weight = (position - low).astype(np.float32).reshape(shape)
        values = (
            values.take(low, axis) * (1 - weight) + values.take(high, axis) * weight
        )
    return values


def slide(
    run: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    options: Mapping[str, Any],
) -> np.ndarray:
    """Logits of a large image from overlapping windows, averaged, as mmseg does it.

    ``run`` goes from ``(1, C, h, w)`` to ``(1, C, h, w)``; ``options`` are
    ``crop_size`` and ``stride`` as ``(h, w)``.
    """
    height, width = image.shape[-2:]
    (crop_h, crop_w), (step_h, step_w) = options["crop_size"], options["stride"]
    total, count = None, np.zeros((1, 1, height, width), np.float32)
    for bottom in _ends(height, crop_h, step_h):
        for right in _ends(width, crop_w, step_w):
            rows = slice(max(bottom - crop_h, 0), bottom)
            window = (..., rows, slice(max(right - crop_w, 0), right))
            logits = run(image[window])
            if total is None:
                total = np.zeros((1, logits.shape[1], height, width), np.float32)
            total[window] += logits
            count[window] += 1
    return total / count


def _ends(length: int, crop: int, step: int) -> list[int]:
    windows = max(length - crop + step - 1, 0) // step + 1
    return [min(index * step + crop, length) for index in range(windows)]
