"""What an exported file must say about itself, read from the config and the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import nn

from mmcastling.deploy import tensors_in
from mmcastling.export import UnsupportedModelError, kind_of
from mmcastling.run.config import datasets_of
from mmcastling.runtime import ExportMetadata
from mmcastling.runtime.preprocess import INTERPOLATIONS, STEPS

_KEPT = (
    "scale",
    "keep_ratio",
    "interpolation",
    "backend",
    "edge",
    "crop_size",
    "size",
    "size_divisor",
    "pad_to_square",
    "pad_val",
)
_DATA_ONLY = ("Load", "Pack", "Collect", "FilterAnnotations")


def describe(
    cfg: Config,
    checkpoint: dict[str, Any],
    model: nn.Module,
    graph: nn.Module,
    part: str,
) -> ExportMetadata:
    """The metadata of a model's exported file.

    Args:
        cfg: The config.
        checkpoint: The loaded checkpoint, whose ``meta`` may name the classes.
        model: The deployed model.
        graph: Its exportable form.
        part: ``'model'`` or ``'backbone'``.

    Raises:
        UnsupportedModelError: If the test pipeline has a step that the runtime does not
            do, or a setting of the model cannot be told.
    """
    kind = "backbone" if part == "backbone" else kind_of(model)
    named = model.backbone if part == "backbone" else model
    facts: dict[str, Any] = _input_of(getattr(model, "data_preprocessor", None))
    if kind == "detector":
        facts.update(_detector_facts(model, facts["pad_divisor"]))
    elif kind == "segmentor":
        facts["segmentation"] = _segmentor_facts(model)
    if kind != "backbone":
        facts.update(_classes(cfg, checkpoint))
    outputs = getattr(graph, "outputs", None) or _names_of_features(graph)
    patch = getattr(model.backbone, "patch_size", 32)
    return ExportMetadata(
        kind=kind,
        name=type(named).__name__,
        outputs=tuple(outputs),
        pipeline=tuple(_steps(cfg)),
        min_size=patch if isinstance(patch, int) else max(patch),
        dynamic_batch=kind != "detector",
        **facts,
    )


def _names_of_features(graph: nn.Module) -> list[str]:
    with torch.no_grad():
        features = tensors_in(graph(torch.zeros(1, 3, 64, 96)))
        return [f"feature_{index}" for index, _ in enumerate(features)]


def _input_of(preprocessor: Any) -> dict[str, Any]:
    """How a toolbox's data preprocessor normalises and pads a test image."""
    found: dict[str, Any] = dict(pad_divisor=1)
    if preprocessor is None:
        return found
    if getattr(preprocessor, "_enable_normalize", False):
        for name in ("mean", "std"):
            found[name] = tuple(getattr(preprocessor, name).flatten().tolist())
    names = ("_channel_conversion", "channel_conversion", "to_rgb")
    found["to_rgb"] = any(getattr(preprocessor, name, False) for name in names)
    divisor = getattr(preprocessor, "pad_size_divisor", 1)
    padding = getattr(preprocessor, "test_cfg", None) or {}  # mmseg's
    divisor = padding.get("size_divisor", divisor)
    found["pad_divisor"] = divisor or 1
    value = getattr(preprocessor, "pad_value", getattr(preprocessor, "pad_val", 0))
    found["pad_value"] = float(value if isinstance(value, (int, float)) else 0)
    return found


def _detector_facts(model: nn.Module, pad_divisor: int) -> dict[str, Any]:
    facts: dict[str, Any] = dict(size_divisor=pad_divisor)
    neck = getattr(model, "neck", None)
    upsampled = neck is not None and any(
        isinstance(module, nn.Upsample) and module.scale_factor is not None
        for module in neck.modules()
    )
    if upsampled:  # coarse maps doubled must meet the finer ones
        head = getattr(model, "rpn_head", None) or model.bbox_head
        coarsest = max(max(stride) for stride in head.prior_generator.strides)
        facts["size_divisor"] = math.lcm(pad_divisor, int(coarsest))
    roi_head = getattr(model, "roi_head", None)
    if roi_head is not None and getattr(roi_head, "with_mask", False):
        threshold = roi_head.test_cfg.mask_thr_binary
        if threshold < 0:
            raise UnsupportedModelError(
                f"mask_thr_binary={threshold} asks for soft masks, which the runtime "
                "does not give: set a threshold from 0 to 1"
            )
        facts["mask_threshold"] = float(threshold)
    return facts


def _segmentor_facts(model: nn.Module) -> dict[str, Any]:
    head, options = model.decode_head, model.test_cfg or {}
    facts: dict[str, Any] = dict(align_corners=bool(head.align_corners))
    if getattr(head, "threshold", None) is not None:
        facts["threshold"] = float(head.threshold)
    facts["mode"] = options.get("mode", "whole")
    if facts["mode"] == "slide":
        for name in ("crop_size", "stride"):
            facts[name] = tuple(options[name])
    return facts


def _classes(cfg: Config, checkpoint: dict[str, Any]) -> dict[str, Any]:
    known = (checkpoint.get("meta") or {}).get("dataset_meta") or {}
    for dataset in datasets_of(cfg, "test"):
        if not known.get("classes"):
            known = dataset.get("metainfo") or {}
        if not known.get("classes"):
            known = getattr(DATASETS.get(dataset["type"]), "METAINFO", None) or {}
    palette = known.get("palette")
    palette = palette if isinstance(palette, (list, tuple)) else ()
    return dict(
        classes=tuple(map(str, known.get("classes") or ())),
        palette=tuple(tuple(map(int, colour)) for colour in palette),
    )


def _steps(cfg: Config) -> Iterator[dict[str, Any]]:
    for dataset in datasets_of(cfg, "test"):
        for step in dataset.get("pipeline") or []:
            name = step["type"] if isinstance(step["type"], str) else ""
            name = name.split(".")[-1]
            if name.startswith(_DATA_ONLY):
                continue
            scale = step.get("scale")
            odd = name == "Resize" and not isinstance(scale, (int, list, tuple))
            method = step.get("interpolation", "bilinear")
            if name not in STEPS or odd or method not in INTERPOLATIONS:
                raise UnsupportedModelError(
                    f"the test pipeline has the step {dict(step)}, which the runtime "
                    f"does not do: use {', '.join(STEPS)} (Resize with scale=(W, H)), "
                    "or set another pipeline with --cfg-options"
                )
            kept = {key: step[key] for key in _KEPT if key in step}
            if name == "Resize" and isinstance(scale, int):
                kept["scale"] = (scale, scale)
            yield dict(type=name, **_plain(kept))
        return


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
