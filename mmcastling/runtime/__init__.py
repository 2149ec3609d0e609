"""Run exported models: numpy in, numpy out, no model code and no torch needed.

    inferencer = ExportedInferencer("detector.onnx")
    result = inferencer.predict("image.jpg")  # boxes, scores, labels, masks

What a file holds and how its images are prepared stands in the file itself, see
:class:`ExportMetadata`. Nothing in this folder imports anything of OpenMMLab, nor torch
unless the file is torch's exported program. What reads pictures needs OpenCV.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mmcastling.runtime.metadata import ExportedModelError, ExportMetadata
from mmcastling.runtime.model import (
    RUNTIMES,
    SUFFIXES,
    ExportedModel,
    is_exported,
)

if TYPE_CHECKING:
    from mmcastling.runtime.inferencer import (
        Classification,
        Detections,
        ExportedInferencer,
        Features,
        Prediction,
        Segmentation,
    )

__all__ = [
    "RUNTIMES",
    "SUFFIXES",
    "Classification",
    "Detections",
    "ExportMetadata",
    "ExportedInferencer",
    "ExportedModel",
    "ExportedModelError",
    "Features",
    "Prediction",
    "Segmentation",
    "is_exported",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.inferencer"), name)
