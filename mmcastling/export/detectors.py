"""Detectors as functions of tensors: boxes, scores, labels and masks of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.export.boxes import (
    check_extractor,
    check_nms,
    crop_rois,
    decode,
    first_rows,
    nonzero_indices,
    suppress,
)
from mmcastling.export.formats import UnsupportedModelError


class DetectorGraph(nn.Module):
    """A detector of one image, in pixels of the network's input.

    ``forward`` takes the image ``(1, 3, H, W)`` and, int64 ``(2,)``, height and width
    of the image inside its padding. It returns boxes ``(N, 4)``, scores ``(N,)``,
    labels int64 ``(N,)``, and masks of probabilities ``(N, h, w)`` where the detector
    has them.
    """

    kind = "detector"

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.outputs: tuple[str, ...] = ("boxes", "scores", "labels")


class OneStageGraph(DetectorGraph):
    """RetinaNet, RTMDet, and what else predicts as mmdet's ``BaseDenseHead``.

    Raises:
        UnsupportedModelError: If the head predicts in another way.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        self.head = detector.bbox_head
        _check_dense_head(self.head, "BaseDenseHead")
        check_nms(self.head.test_cfg.get("nms"))

    def forward(self, images: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        head, options = self.head, self.head.test_cfg
        found = head(self.detector.extract_feat(images))
        if len(found) != 2:
            raise UnsupportedModelError(
                f"{type(head).__name__} gives {len(found)} outputs per level, expected "
                "scores and boxes: export the backbone alone with --part backbone"
            )
        kept = []
        for scores, deltas, priors in _levels(head, *found):
            best, index, labels = _above(
                scores, options.get("score_thr", 0), options.get("nms_pre", -1)
            )
            kept.append((deltas[index], priors[index], best, labels))
        return _decode_and_suppress(head, kept, image_size)


class TwoStageGraph(DetectorGraph):
    """Faster and Mask R-CNN.

    Raises:
        UnsupportedModelError: If a head is of another kind than theirs.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        roi_head = detector.roi_head
        if type(roi_head).__name__ != "StandardRoIHead":
            raise UnsupportedModelError(
                f"a detector with {type(roi_head).__name__} cannot be exported whole, "
                "only with StandardRoIHead (Faster and Mask R-CNN): export its "
                "backbone with --part backbone"
            )
        _check_dense_head(detector.rpn_head, "RPNHead")
        check_nms(detector.rpn_head.test_cfg.nms)
        check_nms(roi_head.test_cfg.nms)
        check_extractor(roi_head.bbox_roi_extractor)
        if getattr(roi_head.bbox_head, "custom_cls_channels", False):
            raise UnsupportedModelError(
                f"the scores of {type(roi_head.bbox_head.loss_cls).__name__} cannot be "
                "exported: export the backbone alone with --part backbone"
            )
        if roi_head.with_mask:
            check_extractor(roi_head.mask_roi_extractor)
            self.outputs = (*self.outputs, "masks")

    def forward(self, images: Tensor, image_size: Tensor) -> tuple[Tensor, ...]:
        maps = self.detector.extract_feat(images)
        proposals = self._propose(maps, image_size)
        boxes, scores, labels = self._classify(maps, proposals, image_size)
        if not self.detector.roi_head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self._masks(maps, boxes, labels)

    def _propose(self, maps: Sequence[Tensor], image_size: Tensor) -> Tensor:
        head = self.detector.rpn_head
        options, kept = head.test_cfg, []
        for level, (scores, deltas, priors) in enumerate(_levels(head, *head(maps))):
            ranked, index = scores[:, 0].sort(descending=True)
            if (most := options.get("nms_pre", -1)) > 0:
                ranked, index = first_rows(ranked, most), first_rows(index, most)
            levels = torch.full_like(index, level)
            kept.append((deltas[index], priors[index], ranked, levels))
        return _decode_and_suppress(head, kept, image_size)[0]

    def _classify(
        self, maps: Sequence[Tensor], rois: Tensor, image_size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        roi_head = self.detector.roi_head
        head, options = roi_head.bbox_head, roi_head.test_cfg
        extractor = roi_head.bbox_roi_extractor
        logits, deltas = head(_crop_one_more(extractor, maps, rois))
        scores = logits[:-1].softmax(dim=1)[:, :-1]  # the last class is background
        best, index, labels = _above(scores, options.score_thr, -1)
        deltas = deltas[:-1].reshape(rois.shape[0], -1, 4)  # (K, classes or 1, 4)
        column = torch.zeros_like(labels) if head.reg_class_agnostic else labels
        boxes = decode(head.bbox_coder, rois[index], deltas[index, column], image_size)
        return suppress(boxes, best, labels, options)

    def _masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        roi_head = self.detector.roi_head
        head = roi_head.mask_head
        cropped = _crop_one_more(roi_head.mask_roi_extractor, maps, boxes)
        logits = head(cropped)[:-1]  # (N, classes or 1, h, w)
        column = torch.zeros_like(labels) if head.class_agnostic else labels
        return logits[torch.arange(labels.shape[0]), column].sigmoid()


def detector_graph(detector: nn.Module) -> DetectorGraph:
    """The exportable form of a detector.

    Raises:
        UnsupportedModelError: If it has none here.
    """
    if getattr(detector, "roi_head", None) is not None:
        if getattr(detector, "rpn_head", None) is not None:
            return TwoStageGraph(detector)
    elif getattr(detector, "bbox_head", None) is not None:
        return OneStageGraph(detector)
    raise UnsupportedModelError(
        f"the detector {type(detector).__name__} cannot be exported whole, only those "
        "with a dense head or with a proposal network and StandardRoIHead: export its "
        "backbone with --part backbone"
    )


def _check_dense_head(head: nn.Module, owner: str) -> None:
    for name in ("_predict_by_feat_single", "_bbox_post_process", "predict_by_feat"):
        method = getattr(type(head), name, None)
        defined_in = getattr(method, "__qualname__", "none").split(".")[0]
        if defined_in not in (owner, "BaseDenseHead"):
            raise UnsupportedModelError(
                f"{type(head).__name__} turns its outputs into boxes in its own way "
                f"({defined_in}.{name}), which cannot be exported: export the backbone "
                "alone with --part backbone"
            )


def _levels(
    head: Any, scores: Sequence[Tensor], deltas: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Scores ``(N, classes)``, deltas ``(N, 4)`` and priors ``(N, 4 or 2)`` by level.

    Scores are probabilities.
    """
    sizes = [level.shape[-2:] for level in scores]
    priors = head.prior_generator.grid_priors(
        sizes, dtype=scores[0].dtype, device=scores[0].device
    )
    rows = []
    for score, delta, prior in zip(scores, deltas, priors, strict=True):
        score = score[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        if head.use_sigmoid_cls:
            score = score.sigmoid()
        else:
            score = score.softmax(dim=1)[:, :-1]
        rows.append((score, delta[0].permute(1, 2, 0).reshape(-1, 4), prior))
    return rows


def _above(
    scores: Tensor, threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``(N, classes)`` above a threshold: value, row and class, ``(M,)`` each.

    At most ``most`` of them, the best, where that is positive.
    """
    flat = scores.reshape(-1)
    index = nonzero_indices(flat > threshold)
    best = flat[index]
    if most > 0:
        best, order = best.sort(descending=True)
        best, index = first_rows(best, most), index[first_rows(order, most)]
    classes = scores.shape[1]
    return best, index // classes, index % classes


def _decode_and_suppress(
    head: Any, kept: list[tuple[Tensor, ...]], image_size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and groups of what survives.

    ``kept`` has deltas, priors, scores and groups (labels or levels) by level.
    """
    deltas, priors, scores, groups = map(torch.cat, zip(*kept, strict=True))
    boxes = decode(head.bbox_coder, priors, deltas, image_size)
    if (smallest := head.test_cfg.get("min_bbox_size", -1)) >= 0:
        sides = boxes[:, 2:] - boxes[:, :2]
        index = nonzero_indices((sides > smallest).all(dim=1))
        boxes, scores, groups = boxes[index], scores[index], groups[index]
    return suppress(boxes, scores, groups, head.test_cfg)


def _crop_one_more(extractor: Any, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Crops of the boxes and of one more, so that no runtime meets a batch of none."""
    boxes = torch.cat([boxes, boxes.new_tensor([[0.0, 0.0, 1.0, 1.0]])])
    return crop_rois(extractor, maps[: extractor.num_inputs], boxes)
