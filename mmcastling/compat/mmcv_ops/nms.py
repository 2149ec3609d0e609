"""Non-maximum suppression: the ops behind ``mmcv.ops.nms`` and ``soft_nms``."""

from collections.abc import Callable

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.widen import widen


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy suppression; stands in for ``mmcv._ext.nms``.

    Args:
        boxes: ``(N, 4)`` as x1, y1, x2, y2.
        scores: ``(N,)``.
        iou_threshold: A box goes when its IoU with a kept one is larger than this.
        offset: 0, or 1 if x2 and y2 name the last pixel inside the box.

    Returns:
        Indices of the kept boxes, highest score first, int64 ``(M,)``.
    """
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.long)
    boxes, scores = widen(boxes), widen(scores).to(widen(boxes))
    if offset:
        # Width and overlap both grow by one pixel, which is what moving the far corner
        # of every box by one does.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores, float(iou_threshold))


def _naive(iou: Tensor, threshold: float, sigma: float) -> Tensor:
    return (iou < threshold).to(iou)


def _linear(iou: Tensor, threshold: float, sigma: float) -> Tensor:
    return torch.where(iou >= threshold, 1 - iou, torch.ones_like(iou))


def _gaussian(iou: Tensor, threshold: float, sigma: float) -> Tensor:
    return torch.exp(-(iou * iou) / sigma)


_DECAYS: tuple[Callable[[Tensor, float, float], Tensor], ...] = (
    _naive,
    _linear,
    _gaussian,
)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft suppression; stands in for ``mmcv._ext.softnms``.

    The box with the highest score is taken and the scores of the others are multiplied
    by a function of their IoU with it; those that fall below ``min_score`` are dropped;
    and so on with what remains. The very first box is never tested against
    ``min_score``. Among equal scores the compiled op takes the first in an array whose
    gaps it fills from the end, and so does this one.

    One thing differs: two boxes without area have an IoU of 0 here; in the compiled op
    0/0 makes the score of the second NaN under the gaussian method.

    Args:
        boxes: ``(N, 4)`` as x1, y1, x2, y2.
        scores: ``(N,)``.
        dets: ``(N, 5)``; its first M rows are overwritten by the boxes that are kept
            and their decayed scores, in the order in which they were taken.
        iou_threshold: From this IoU on, methods 0 and 1 act.
        sigma: Width of method 2.
        min_score: Boxes whose decayed score is smaller are dropped.
        method: 0 naive (the factor is 0), 1 linear (1 - IoU), 2 gaussian
            (exp(-IoU^2 / sigma)).
        offset: 0, or 1 if x2 and y2 name the last pixel inside the box.

    Returns:
        Indices of the kept boxes in the order of ``dets``, int64 ``(M,)``.
    """
    boxes, scores = widen(boxes), widen(scores).clone()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    decay = _DECAYS[method]
    remaining = torch.arange(len(boxes), device=boxes.device)
    taken = []
    while len(remaining):
        position = scores[remaining].argmax()
        best = remaining[position].clone()
        taken.append(best)
        remaining[position] = remaining[0]
        remaining = remaining[1:]

        others = boxes[remaining]
        near = torch.maximum(boxes[best, :2], others[:, :2])
        far = torch.minimum(boxes[best, 2:], others[:, 2:])
        overlap = (far - near + offset).clamp(min=0).prod(1)
        union = areas[best] + areas[remaining] - overlap
        iou = (overlap / union).nan_to_num(nan=0.0)
        decayed = scores[remaining] * decay(iou, iou_threshold, sigma)
        scores[remaining] = decayed
        remaining = _drop(remaining, decayed < min_score)

    if not taken:
        return boxes.new_empty(0, dtype=torch.long)
    kept = torch.stack(taken)
    dets[: len(kept)] = torch.cat([boxes[kept], scores[kept, None]], 1).to(dets)
    return kept


def _drop(items: Tensor, dead: Tensor) -> Tensor:
    """Remove the dead items, filling each gap with the last living one, ``(M,)``."""
    size = int(dead.numel() - dead.sum())
    kept = items[:size]
    kept[dead[:size]] = items[size:][~dead[size:]].flip(0)
    return kept
