"""What an exported file says about itself, as far as the model tells it."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from mmcastling.export.formats import UnsupportedModelError
from mmcastling.runtime import ExportMetadata


def describe(
    model: nn.Module, graph: nn.Module, part: str = "model", **facts: Any
) -> ExportMetadata:
    """The metadata of a model's exported file.

    Args:
        model: The deployed model.
        graph: What :func:`mmcastling.export.export_graph` makes of it.
        part: As there.
        **facts: What the model does not know: ``classes``, ``palette``, ``pipeline``,
            ``versions``.

    Raises:
        UnsupportedModelError: If the runtime does not do what a setting asks for.
    """
    facts |= _input_of(getattr(model, "data_preprocessor", None))
    if graph.kind == "detector":
        facts |= _detector_facts(model, facts["pad_divisor"])
    elif graph.kind == "segmentor":
        facts["segmentation"] = _segmentor_facts(model)
    patch = getattr(model.backbone, "patch_size", 32)
    return ExportMetadata(
        kind=graph.kind,
        name=type(model.backbone if part == "backbone" else model).__name__,
        outputs=tuple(graph.outputs),
        min_size=patch if isinstance(patch, int) else max(patch),
        dynamic_batch=graph.kind != "detector",
        **facts,
    )


def _input_of(preprocessor: Any) -> dict[str, Any]:
    """How a toolbox's data preprocessor normalizes and pads a test image."""
    if preprocessor is None:
        return dict(pad_divisor=1)
    found: dict[str, Any] = {}
    if getattr(preprocessor, "_enable_normalize", False):
        for name in ("mean", "std"):
            found[name] = tuple(getattr(preprocessor, name).flatten().tolist())
    names = ("_channel_conversion", "channel_conversion", "to_rgb")
    found["to_rgb"] = any(getattr(preprocessor, name, False) for name in names)
    padding = getattr(preprocessor, "test_cfg", None) or {}  # mmseg's
    divisor = getattr(preprocessor, "pad_size_divisor", 1)
    found["pad_divisor"] = padding.get("size_divisor", divisor) or 1
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
