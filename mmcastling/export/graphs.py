"""Models of the toolboxes as functions of a batch of images, and as files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from mmcastling.analysis import input_channels
from mmcastling.analysis.data_sample import DataSample
from mmcastling.deploy.verify import tensors_in
from mmcastling.export.formats import (
    DEFAULT_FORMAT,
    DEFAULT_OPSET,
    UnsupportedModelError,
    write,
)
from mmcastling.export.pools import replace_pools
from mmcastling.runtime import ExportMetadata


class BackboneGraph(nn.Module):
    """The feature maps of a backbone from ``(B, C, H, W)``."""

    kind = "backbone"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def outputs(self) -> tuple[str, ...]:
        with torch.no_grad():
            features = self(torch.zeros(1, input_channels(self), 64, 96))
        return tuple(f"feature_{index}" for index, _ in enumerate(features))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.backbone(images)))


class ClassifierGraph(nn.Module):
    """The scores of a classifier ``(B, classes)`` from ``(B, C, H, W)``."""

    kind = "classifier"
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
        self.multi_label = name.startswith(("MultiLabel", "CSRA"))
        if name.startswith("MultiTask"):
            raise UnsupportedModelError(
                f"the scores of {name} cannot be exported: export the backbone alone "
                "with --part backbone"
            )

    def forward(self, images: Tensor) -> tuple[Tensor]:
        logits = self.classifier.head(self.classifier.extract_feat(images))
        return (logits.sigmoid() if self.multi_label else logits.softmax(dim=1),)


class SegmentorGraph(nn.Module):
    """The logits of a segmentor ``(B, classes, H, W)`` from ``(B, C, H, W)``."""

    kind = "segmentor"
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
        head = self.segmentor.decode_head
        logits = head(self.segmentor.extract_feat(images))
        logits = F.interpolate(
            logits,
            size=images.shape[2:],
            mode="bilinear",
            align_corners=head.align_corners,
        )
        return (logits,)


def export_graph(model: nn.Module, part: str = "model") -> nn.Module:
    """A copy of a deployed model, in the form that is exported.

    Args:
        model: A detector, segmentor or classifier, in evaluation mode.
        part: ``'model'`` or ``'backbone'``.

    Returns:
        A module with its ``kind`` and the names of its ``outputs``, see
        :class:`mmcastling.runtime.ExportMetadata`.

    Raises:
        UnsupportedModelError: If it has no exportable form.
    """
    make: Any
    if part == "backbone":
        make, model_name = BackboneGraph, type(model).__name__
        model = getattr(model, "backbone", None)
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"{model_name} has no backbone: export it with --part model"
            )
    elif hasattr(model, "bbox_head") or hasattr(model, "roi_head"):
        from mmcastling.export.detectors import detector_graph  # needs torchvision

        make = detector_graph
    elif hasattr(model, "decode_head"):
        make = SegmentorGraph
    elif hasattr(model, "head") and hasattr(model, "extract_feat"):
        make = ClassifierGraph
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no detector, segmentor or classifier: export "
            "its backbone with --part backbone"
        )
    graph = make(copy.deepcopy(model)).requires_grad_(False)
    replace_pools(graph)
    return graph.train(False)


def describe(
    model: nn.Module,
    graph: nn.Module,
    part: str = "model",
    format: str = DEFAULT_FORMAT,
    **facts: Any,
) -> ExportMetadata:
    """The metadata of a model's exported file.

    Args:
        model: The deployed model.
        graph: What :func:`mmcastling.export.export_graph` makes of it.
        part: As there.
        format: One of :data:`mmcastling.export.FORMATS`. Defaults to ``'onnx'``.
        **facts: What the model does not know: ``classes``, ``palette``, ``pipeline``,
            ``versions``.

    Raises:
        UnsupportedModelError: If the runtime does not do what a setting asks for.
    """
    facts |= input_of(getattr(model, "data_preprocessor", None))
    if graph.kind == "detector":
        facts |= _detector_facts(model, facts["pad_divisor"])
    elif graph.kind == "segmentor":
        facts["segmentation"] = _segmentor_facts(model)
    patch = getattr(model.backbone, "patch_size", 32)
    smallest = patch if isinstance(patch, int) else max(patch)
    if format == "exported-program":
        smallest += 1  # torch asserts that a grid of tokens has two rows and columns
    return ExportMetadata(
        kind=graph.kind,
        name=type(model.backbone if part == "backbone" else model).__name__,
        outputs=tuple(graph.outputs),
        channels=input_channels(model),
        min_size=smallest,
        dynamic_batch=graph.kind != "detector",
        **facts,
    )


def input_of(preprocessor: Any) -> dict[str, Any]:
    """How a toolbox's data preprocessor normalizes and pads a test image."""
    if preprocessor is None:
        return dict(pad_divisor=1)
    found: dict[str, Any] = {}
    if getattr(preprocessor, "_enable_normalize", False):
        for name in ("mean", "std"):
            found[name] = tuple(getattr(preprocessor, name).flatten().tolist())
    names = ("_channel_conversion", "channel_conversion", "to_rgb")
    found["to_rgb"] = any(getattr(preprocessor, name, False) for name in names)
    padding = dict(size_divisor=getattr(preprocessor, "pad_size_divisor", 1))
    if hasattr(preprocessor, "test_cfg"):  # mmseg's, whose other padding is training's
        padding = preprocessor.test_cfg or {}
    found["pad_divisor"] = padding.get("size_divisor") or 1
    if padding.get("size") is not None:
        found["pad_size"] = tuple(padding["size"])
    value = getattr(preprocessor, "pad_value", getattr(preprocessor, "pad_val", 0))
    found["pad_value"] = float(value if isinstance(value, (int, float)) else 0)
    return found


def _detector_facts(model: nn.Module, pad_divisor: int) -> dict[str, Any]:
    facts: dict[str, Any] = dict(size_divisor=pad_divisor)
    if any(
        isinstance(module, nn.Upsample) and module.scale_factor is not None
        for module in (getattr(model, "neck", None) or nn.Identity()).modules()
    ):  # coarse maps doubled must meet the finer ones
        head = getattr(model, "rpn_head", None) or model.bbox_head
        coarsest = max(max(stride) for stride in head.prior_generator.strides)
        facts["size_divisor"] = math.lcm(pad_divisor, int(coarsest))
    if getattr(getattr(model, "roi_head", None), "with_mask", False):
        threshold = model.roi_head.test_cfg.mask_thr_binary
        if threshold < 0:
            raise UnsupportedModelError(
                f"mask_thr_binary={threshold} asks for soft masks, which the runtime "
                "does not give: set a threshold from 0 to 1"
            )
        facts["mask_threshold"] = float(threshold)
    return facts


def _segmentor_facts(model: nn.Module) -> dict[str, Any]:
    head, options = model.decode_head, model.test_cfg or {}
    facts: dict[str, Any] = dict(mode=options.get("mode", "whole"))
    facts["align_corners"] = bool(head.align_corners)
    if getattr(head, "threshold", None) is not None:
        facts["threshold"] = float(head.threshold)
    if facts["mode"] == "slide":
        facts |= {name: tuple(options[name]) for name in ("crop_size", "stride")}
    return facts


def write_graph(
    graph: nn.Module,
    path: Path,
    metadata: ExportMetadata,
    format: str,
    opset: int = DEFAULT_OPSET,
) -> None:
    """Write a graph of images of any height and width, with its metadata.

    Args:
        graph: From :func:`export_graph`.
        path: As in :func:`mmcastling.export.write`, as what follows.
        metadata: What the file says about its model.
        format: One of :data:`mmcastling.export.FORMATS`.
        opset: Of ONNX. Defaults to 18.

    Raises:
        UnsupportedModelError, OSError: As :func:`mmcastling.export.write`.
    """
    # Traced at no usual size, so that nothing of it is kept.
    unit = metadata.size_divisor
    height = -(-max(160, metadata.min_size) // unit) * unit
    width = height + max(unit, 64 // unit * unit)
    batch = 2 if metadata.dynamic_batch else 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, metadata.channels, height, width, generator=generator)
    free: dict[int, Any] = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if unit > 1:
        free = {2: unit * Dim("rows"), 3: unit * Dim("columns")}
    if metadata.dynamic_batch:
        free[0] = Dim.DYNAMIC
    example = {"images": (images, free)}
    if metadata.kind == "detector":
        example["image_size"] = (torch.tensor([height, width]), {})
    tensors, shapes = zip(*example.values(), strict=True)
    write(
        graph,
        path,
        tensors,
        format=format,
        inputs=list(example),
        outputs=list(metadata.outputs),
        dynamic_shapes=shapes,
        metadata=metadata.to_json(),
        opset=opset,
    )


@torch.inference_mode()
def reference_outputs(
    model: nn.Module, kind: str, images: Tensor, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The toolbox's own prediction, by the names of an exported file's outputs.

    Args:
        model: The deployed model in evaluation mode.
        kind: ``kind`` of what :func:`export_graph` makes of it.
        images: One preprocessed image ``(1, C, H, W)``.
        size: ``(H, W)`` of the image without padding.

    Returns:
        Arrays by name; a detector's ``masks`` are bool ``(N, *size)``.
    """
    padded = tuple(images.shape[2:])
    found: dict[str, Tensor]
    if kind == "backbone":
        features = tensors_in(model.backbone(images))
        found = {f"feature_{index}": value for index, value in enumerate(features)}
    elif kind == "classifier":
        (sample,) = model.predict(images)
        found = {"scores": sample.pred_score[None]}
    elif kind == "segmentor":
        meta = DataSample(padded, padded).metainfo
        found = {"logits": model.encode_decode(images, [meta])}
    else:
        sample = DataSample(size, padded)
        (sample,) = model.predict(images, [sample], rescale=True)
        names = dict(bboxes="boxes", scores="scores", labels="labels", masks="masks")
        instances = sample.pred_instances
        found = {
            ours: instances[name] for name, ours in names.items() if name in instances
        }
    return {name: value.cpu().numpy() for name, value in found.items()}
