"""Detectors as functions of tensors: boxes, scores, labels and masks of one image.

mmdet's own code branches in Python on how many boxes there are. What stands here does
the same arithmetic in the same order without asking, so that a graph traced at one
image serves all. Boxes are ``(N, 4)`` as x1, y1, x2, y2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torchvision  # noqa: F401, whose ops are used by name
from torch import Tensor, nn

from mmcastling.export.formats import UnsupportedModelError

# Their kernels are torchvision's; exporters know them by these names.
_nms = torch.ops.torchvision.nms
_roi_align = torch.ops.torchvision.roi_align


class DetectorGraph(nn.Module):
    """A detector of one image, in pixels of the network's input.

    ``forward`` takes the image ``(1, C, H, W)`` and, int64 ``(2,)``, height and width
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
        score = _rows(score, head.cls_out_channels)
        if head.use_sigmoid_cls:
            score = score.sigmoid()
        else:
            score = score.softmax(dim=1)[:, :-1]
        rows.append((score, _rows(delta, 4), prior))
    return rows


def _rows(maps: Tensor, columns: int) -> Tensor:
    """Maps ``(1, A * columns, H, W)`` as ``(H * W * A, columns)``.

    In steps that leave the sizes of maps alone, of which tracing reasons for long.
    """
    rows = maps[0].flatten(1).transpose(0, 1).unflatten(1, (-1, columns))
    return rows.flatten(0, 1)


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


def nonzero_indices(mask: Tensor) -> Tensor:
    """Indices of the true entries ``(N,)``, int64 ``(M,)``."""
    return torch.nonzero(mask).squeeze(1)


def first_rows(x: Tensor, most: int) -> Tensor:
    """The first ``most`` rows, or all where there are fewer.

    A plain slice would decide at export which of the two it is, for all images.
    """
    if torch.compiler.is_exporting():
        return x[: torch.sym_min(most, x.shape[0])]
    return x[:most]


def decode(coder: Any, priors: Tensor, deltas: Tensor, image_size: Tensor) -> Tensor:
    """What ``coder.decode`` makes of a head's output ``(N, 4)``.

    ``priors`` are boxes or points ``(N, 2)``; boxes are clipped to ``image_size``,
    ``(H, W)``.

    Raises:
        UnsupportedModelError: If the coder is neither mmdet's ``DeltaXYWHBBoxCoder``
            nor its ``DistancePointBBoxCoder``.
    """
    name = type(coder).__name__
    if name == "DistancePointBBoxCoder":
        near = priors[:, :2] - deltas[:, :2]
        far = priors[:, :2] + deltas[:, 2:]
    elif name == "DeltaXYWHBBoxCoder" and not coder.add_ctr_clamp:
        deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
        centre = (priors[:, :2] + priors[:, 2:]) * 0.5
        side = priors[:, 2:] - priors[:, :2]
        centre = centre + side * deltas[:, :2]
        limit = abs(math.log(16 / 1000))  # mmdet's wh_ratio_clip
        half = side * deltas[:, 2:].clamp(min=-limit, max=limit).exp() * 0.5
        near, far = centre - half, centre + half
    else:
        raise UnsupportedModelError(
            f"boxes decoded by {name} cannot be exported: choose DeltaXYWHBBoxCoder "
            "(without add_ctr_clamp) or DistancePointBBoxCoder, or export the backbone "
            "alone with --part backbone"
        )
    boxes = torch.cat([near, far], dim=1)
    if not coder.clip_border:
        return boxes
    height, width = image_size.to(boxes.dtype).unbind()
    border = torch.stack([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), border)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and groups that survive suppression in their group, best first.

    As mmcv's ``batched_nms``: groups are moved apart, so that one call serves all.

    Args:
        boxes: ``(N, 4)``.
        scores: ``(N,)``.
        groups: int64 ``(N,)``: classes or levels.
        options: The config's ``test_cfg`` with ``nms`` and ``max_per_img``.
    """
    apart = boxes
    if not options.nms.get("class_agnostic", False):
        # With a zero, since the largest of no numbers is none.
        far = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
        apart = boxes + groups.to(boxes.dtype)[:, None] * far
    kept = _nms(apart, scores, float(options.nms.get("iou_threshold", 0.5)))
    kept = first_rows(kept, options.max_per_img)
    return boxes[kept], scores[kept], groups[kept]


def check_nms(options: Any) -> None:
    """Raise unless a config's ``nms`` is the plain, greedy one.

    Raises:
        UnsupportedModelError: If not.
    """
    known = {"type", "iou_threshold", "class_agnostic", "split_thr"}
    kind = options.get("type", "nms") if options else None
    if kind != "nms" or (more := set(options) - known):
        what = f"{kind!r}" if kind != "nms" else f"'nms' with {sorted(more)}"
        raise UnsupportedModelError(
            f"suppression by {what} has no standard ONNX operator: export with "
            "nms=dict(type='nms', iou_threshold=...), or --part backbone"
        )


def crop_rois(extractor: Any, maps: Any, rois: Tensor) -> Tensor:
    """What mmdet's ``SingleRoIExtractor`` gives for the boxes of one image.

    From its levels ``(1, C, h, w)`` and ``(K, 4)`` boxes to ``(K, C, height, width)``.
    """
    layers = extractor.roi_layers
    indexed = torch.cat([rois.new_zeros(rois.shape[0], 1), rois], dim=1)
    if len(layers) == 1:
        return _crop(layers[0], maps[0], indexed)
    size = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
    levels = torch.log2(size / extractor.finest_scale + 1e-6).floor()
    levels = levels.clamp(min=0, max=len(layers) - 1)
    height, width = layers[0].output_size
    out = rois.new_zeros(rois.shape[0], maps[0].shape[1], height, width)
    for level, (layer, features) in enumerate(zip(layers, maps, strict=True)):
        index = nonzero_indices(levels == level)
        out = out.index_put((index,), _crop(layer, features, indexed[index]))
    return out


def _crop(layer: Any, features: Tensor, rois: Tensor) -> Tensor:
    height, width = layer.output_size
    scale, ratio = layer.spatial_scale, layer.sampling_ratio
    return _roi_align(features, rois, scale, height, width, ratio, layer.aligned)


def check_extractor(extractor: Any) -> None:
    """Raise unless an RoI extractor is one that :func:`crop_rois` reproduces.

    Raises:
        UnsupportedModelError: If not.
    """
    layers = getattr(extractor, "roi_layers", [None])
    plain = type(extractor).__name__ == "SingleRoIExtractor" and all(
        type(layer).__name__ == "RoIAlign" and layer.pool_mode == "avg"
        for layer in layers
    )
    if not plain:
        raise UnsupportedModelError(
            f"RoIs cropped by {type(extractor).__name__} of "
            f"{type(layers[0]).__name__} cannot be exported: expected "
            "SingleRoIExtractor with RoIAlign that averages; or export the backbone "
            "alone with --part backbone"
        )
