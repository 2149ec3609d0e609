"""Non-maximum suppression: the ops behind ``mmcv.ops.nms`` and ``soft_nms``."""

from types import SimpleNamespace

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.calling import register_op, widen


@register_op("boxes scores iou_threshold offset")
def nms(op: SimpleNamespace) -> Tensor:
    """Greedy suppression of boxes ``(N, 4)``, x1, y1, x2, y2, by scores ``(N,)``.

    A box goes when its IoU with a kept one is larger than ``iou_threshold``. ``offset``
    is 0, or 1 if x2 and y2 name the last pixel inside the box.
    Returns indices of the kept boxes, highest score first, int64 ``(M,)``.
    """
    boxes, scores = widen(op.boxes), widen(op.scores).to(widen(op.boxes))
    if boxes.numel() == 0:
        return boxes.new_empty(0, dtype=torch.long)
    if op.offset:
        # Width and overlap both grow by one pixel, which is what moving the far corner
        # of every box by one does.
        boxes = boxes + boxes.new_tensor([0, 0, op.offset, op.offset])
    return torch.ops.torchvision.nms(boxes, scores, float(op.iou_threshold))


_DECAYS = (
    lambda iou, threshold, sigma: (iou < threshold).to(iou),
    lambda iou, threshold, sigma: (1 - iou).where(iou >= threshold, 1),
    lambda iou, threshold, sigma: torch.exp(-(iou * iou) / sigma),
)
"""Naive, linear and gaussian."""


@register_op("boxes scores dets iou_threshold sigma min_score method offset")
def softnms(op: SimpleNamespace) -> Tensor:
    """Soft suppression of boxes ``(N, 4)``, x1, y1, x2, y2, by scores ``(N,)``.

    The box with the highest score is taken and the scores of the others are multiplied
    by a function of their IoU with it: by ``method`` 0 (naive) 0 and 1 (linear)
    ``1 - IoU``, from ``iou_threshold`` on, 2 (gaussian) ``exp(-IoU^2 / sigma)``. Those
    that fall below ``min_score`` are dropped; and so on with what remains. The very
    first box is never tested against ``min_score``. Among equal scores the compiled op
    takes the first in an array whose gaps it fills from the end, and so does this one.
    ``offset`` is 0, or 1 if x2 and y2 name the last pixel inside the box.

    One thing differs: two boxes without area have an IoU of 0 here; in the compiled op
    0/0 makes the score of the second NaN under the gaussian method.

    Returns indices of the kept boxes in the order in which they were taken, int64
    ``(M,)``, and overwrites the first M rows of ``dets``, ``(N, 5)``, by these boxes
    and their decayed scores.
    """
    boxes, scores, offset = widen(op.boxes), widen(op.scores).clone(), op.offset
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    decay = _DECAYS[op.method]
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
        decayed = scores[remaining] * decay(iou, op.iou_threshold, op.sigma)
        scores[remaining] = decayed
        remaining = _drop(remaining, decayed < op.min_score)

    if not taken:
        return boxes.new_empty(0, dtype=torch.long)
    kept = torch.stack(taken)
    found = torch.cat([boxes[kept], scores[kept, None]], 1)
    op.dets[: len(kept)] = found.to(op.dets)
    return kept


def _drop(items: Tensor, dead: Tensor) -> Tensor:
    """Remove the dead items, filling each gap with the last living one, ``(M,)``."""
    size = int(dead.numel() - dead.sum())
    kept = items[:size]
    kept[dead[:size]] = items[size:][~dead[size:]].flip(0)
    return kept
