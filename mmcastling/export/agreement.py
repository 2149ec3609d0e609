"""Whether an exported file computes the same as the module that it came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmcastling.runtime.postprocess import paste_masks

Arrays = dict[str, np.ndarray]

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest or 1."""

SCORE_TOLERANCE = 1e-3
"""Largest difference of the scores of detections that are the same."""

SAME_BOX = 0.99
"""Smallest IoU of detections that are the same."""

ROUNDED_BOX = 0.5
"""The same where one side is rounded, whatever the scores."""

MOST_UNMATCHED = 0.02
"""Share of detections without a partner that counts as agreement: where an IoU or a
score lies within rounding of a threshold, one of two boxes survives here, the other
there."""


@dataclass(frozen=True)
class Agreement:
    """How far two sets of outputs are apart.

    Attributes:
        difference: Largest difference; of detections that are the same, of their
            scores.
        limit: What it may be.
        found: Detections of torch, None for what is no detector.
        matched: Of them and the file's, how many have a partner.
        unmatched: And how many have none.
        box_iou: Mean IoU of the boxes of those that have.
        mask_iou: And of their masks.
    """

    difference: float
    limit: float
    found: int | None = None
    matched: int = 0
    unmatched: int = 0
    box_iou: float | None = None
    mask_iou: float | None = None

    @property
    def holds(self) -> bool:
        """Whether they are the same up to rounding."""
        if not self.difference <= self.limit:  # also where NaN
            return False
        if self.mask_iou is not None and self.mask_iou < SAME_BOX:
            return False
        total = self.matched + self.unmatched
        return self.unmatched <= max(MOST_UNMATCHED * total, 1 if total > 20 else 0)

    def __str__(self) -> str:
        if self.found is None:
            return f"largest difference {self.difference:.2g}"
        text = (
            f"{self.found} detections, {self.unmatched} of both unmatched, scores "
            f"differ by up to {self.difference:.2g}"
        )
        for what, iou in (("boxes", self.box_iou), ("masks", self.mask_iou)):
            if iou is not None:
                text += f", {what} have IoU {iou:.4f}"
        return text


def compare(expected: Arrays, got: Arrays) -> Agreement:
    """Compare a file's outputs with those of its module, by name."""
    difference, largest = 0.0, 1.0
    for name, value in expected.items():
        if value.shape != got[name].shape:
            return Agreement(float("inf"), TOLERANCE)
        apart = np.abs(value.astype(np.float64) - got[name])
        difference = np.maximum(difference, apart.max(initial=0.0))  # passes NaN on
        largest = max(largest, float(np.abs(value).max(initial=0.0)))
    return Agreement(float(difference), TOLERANCE * largest)


def compare_detections(
    expected: Arrays,
    got: Arrays,
    size: tuple[int, int],
    mask_threshold: float = 0.5,
    rounded: bool = False,
) -> Agreement:
    """Compare detections, which may come in another order, by their boxes.

    Args:
        expected: Torch's, by name; ``masks`` are bool ``(N, H, W)``.
        got: The file's raw outputs, or masks that are pasted already.
        size: ``(H, W)`` of the image without padding.
        mask_threshold: Pixels of a mask have at least this probability. Defaults to
            0.5.
        rounded: Whether the file computes in lower precision, where the question is how
            far detections are apart, not whether they are the same. Defaults to False.
    """
    limits = (ROUNDED_BOX, 1.0) if rounded else (SAME_BOX, SCORE_TOLERANCE)
    pairs = match(expected, got, *limits)
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    apart = np.abs(expected["scores"][first] - got["scores"][second])
    box_iou = mask_iou = None
    if pairs:
        overlap = _ious(expected["boxes"], got["boxes"])
        box_iou = float(overlap[first, second].mean())
    if pairs and "masks" in expected:
        ours = got["masks"][second]
        if ours.dtype != bool:
            ours = paste_masks(ours, got["boxes"][second], size, mask_threshold)
        theirs = expected["masks"][first]
        both = (ours & theirs).sum(axis=(1, 2))
        either = (ours | theirs).sum(axis=(1, 2))
        mask_iou = float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())
    return Agreement(
        float(apart.max(initial=0.0)),
        SCORE_TOLERANCE,
        found=len(expected["scores"]),
        matched=2 * len(pairs),
        unmatched=len(expected["scores"]) + len(got["scores"]) - 2 * len(pairs),
        box_iou=box_iou,
        mask_iou=mask_iou,
    )


def match(
    expected: Arrays, got: Arrays, same_box: float, score_tolerance: float
) -> list[tuple[int, int]]:
    """Pairs of detections of one class whose boxes and scores are the same.

    Boxes have an IoU of ``same_box`` or more, scores differ by no more than
    ``score_tolerance``. Returned are indices into both, each used once.
    """
    overlap = _ious(expected["boxes"], got["boxes"])
    apart = np.abs(expected["scores"][:, None] - got["scores"][None])
    same = expected["labels"][:, None] == got["labels"][None]
    overlap = np.where(same & (apart <= score_tolerance), overlap, 0.0)
    pairs = []
    for _ in range(min(overlap.shape)):
        index = np.unravel_index(overlap.argmax(), overlap.shape)
        if overlap[index] < same_box:
            break
        pairs.append((int(index[0]), int(index[1])))
        overlap[index[0]], overlap[:, index[1]] = 0.0, 0.0
    return pairs


def _ious(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = one.astype(np.float64), other.astype(np.float64)
    near = np.maximum(one[:, None, :2], other[None, :, :2])
    far = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.maximum(far - near, 0.0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    # Boxes without an area are the same where their corners are.
    corners = np.abs(one[:, None] - other[None]).max(axis=2, initial=0.0)
    return np.where(union > 0, shared / np.maximum(union, 1e-12), corners < 1e-2)
