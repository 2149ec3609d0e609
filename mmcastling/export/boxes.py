"""Boxes as tensors only: what detectors do after their heads, in exportable form.

mmdet's own code branches in Python on how many boxes there are. What stands here does
the same arithmetic in the same order without asking, so that a graph traced at one
image serves all. Boxes are ``(N, 4)`` as x1, y1, x2, y2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torchvision  # noqa: F401, whose ops are used by name
from torch import Tensor

from mmcastling.export.formats import UnsupportedModelError

# Their kernels are torchvision's; exporters know them by these names.
_nms = torch.ops.torchvision.nms
_roi_align = torch.ops.torchvision.roi_align


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
