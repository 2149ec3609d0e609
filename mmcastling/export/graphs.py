"""Backbones, classifiers and segmentors as functions of one batch of images."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcastling.deploy.verify import tensors_in
from mmcastling.export.boxes import UnsupportedModelError
from mmcastling.export.detectors import detector_graph


class BackboneGraph(nn.Module):
    """The feature maps of a backbone, ``feature_0`` and so on."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """From ``(B, 3, H, W)``."""
        return tuple(tensors_in(self.backbone(images)))


class ClassifierGraph(nn.Module):
    """The scores of a classifier ``(B, classes)``."""

    outputs = ("scores",)

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        if getattr(classifier, "head", None) is None:
            raise UnsupportedModelError(
                f"the classifier {type(classifier).__name__} has no head that scores "
                "classes: export its backbone with --part backbone"
            )
        self.classifier = classifier
        name = type(classifier.head).__name__
        self.several = name.startswith(("MultiLabel", "CSRA"))
        if name.startswith("MultiTask"):
            raise UnsupportedModelError(
                f"the scores of {name} cannot be exported: export the backbone alone "
                "with --part backbone"
            )

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """From ``(B, 3, H, W)``."""
        logits = self.classifier.head(self.classifier.extract_feat(images))
        if self.several:
            return (logits.sigmoid(),)
        return (logits.softmax(dim=1),)


class SegmentorGraph(nn.Module):
    """The logits of a segmentor ``(B, classes, H, W)``, as large as the images."""

    outputs = ("logits",)

    def __init__(self, segmentor: nn.Module) -> None:
        super().__init__()
        head = getattr(segmentor, "decode_head", None)
        if not hasattr(head, "align_corners") or not hasattr(head, "cls_seg"):
            raise UnsupportedModelError(
                f"the segmentor {type(segmentor).__name__} with "
                f"{type(head).__name__} cannot be exported whole, only one head that "
                "derives from mmseg's BaseDecodeHead: export its backbone with --part "
                "backbone"
            )
        self.segmentor = segmentor

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """From ``(B, 3, H, W)``."""
        head = self.segmentor.decode_head
        logits = head(self.segmentor.extract_feat(images))
        logits = F.interpolate(
            logits,
            size=images.shape[2:],
            mode="bilinear",
            align_corners=head.align_corners,
        )
        return (logits,)


class AnySizeAdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for maps of any size.

    ONNX has no operator for it unless the size is known at export. Row ``i`` averages
    the rows from ``floor(i H / out)`` up to ``ceil((i + 1) H / out)``.
    """

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        if isinstance(output_size, int):
            output_size = (output_size, output_size)
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """From ``(B, C, H, W)`` to ``(B, C, *output_size)``."""
        height, width = self.output_size
        rows, columns = _bins(x, 2, height), _bins(x, 3, width)
        return rows @ x @ columns.transpose(0, 1)


def _bins(x: Tensor, axis: int, count: int) -> Tensor:
    length = x.shape[axis]
    cells = torch.arange(length, device=x.device)
    bins = torch.arange(count, device=x.device)[:, None]
    inside = (cells >= bins * length // count) & (
        cells < ((bins + 1) * length + count - 1) // count
    )
    weights = inside.to(x.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def kind_of(model: nn.Module) -> str:
    """``'detector'``, ``'segmentor'`` or ``'classifier'``.

    Raises:
        UnsupportedModelError: If the model is none of these.
    """
    if hasattr(model, "bbox_head") or hasattr(model, "roi_head"):
        return "detector"
    if hasattr(model, "decode_head"):
        return "segmentor"
    if hasattr(model, "head") and hasattr(model, "extract_feat"):
        return "classifier"
    raise UnsupportedModelError(
        f"{type(model).__name__} is no detector, segmentor or classifier: export its "
        "backbone with --part backbone"
    )


def export_graph(model: nn.Module, part: str = "model") -> nn.Module:
    """A copy of a deployed model, in the form that is exported.

    Args:
        model: A detector, segmentor or classifier, in evaluation mode.
        part: ``'model'`` or ``'backbone'``.

    Raises:
        UnsupportedModelError: If it has no exportable form.
    """
    if part == "backbone":
        if not isinstance(getattr(model, "backbone", None), nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no backbone: export it with --part model"
            )
        model = model.backbone
    kinds: dict[str, Any] = dict(
        detector=detector_graph, segmentor=SegmentorGraph, classifier=ClassifierGraph
    )
    make = BackboneGraph if part == "backbone" else kinds[kind_of(model)]
    graph = make(copy.deepcopy(model)).requires_grad_(False)
    _replace_pools(graph)
    return graph.train(False)


def _replace_pools(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size not in (
            1,
            (1, 1),
        ):
            setattr(module, name, AnySizeAdaptivePool(child.output_size))
        else:
            _replace_pools(child)
