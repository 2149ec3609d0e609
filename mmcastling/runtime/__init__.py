"""Run exported models: numpy in, numpy out, no model code and no torch needed.

    inferencer = ExportedInferencer("detector.onnx")
    result = inferencer.predict("image.jpg")  # boxes, scores, labels, masks

What a file holds and how its images are prepared stands in the file itself, see
:class:`ExportMetadata`. Nothing in this folder imports anything of OpenMMLab, nor torch
unless the file is torch's exported program.
"""

from mmcastling.runtime.inferencer import (
    Classification,
    Detections,
    ExportedInferencer,
    Features,
    Prediction,
    Segmentation,
)
from mmcastling.runtime.metadata import ExportedModelError, ExportMetadata
from mmcastling.runtime.model import (
    RUNTIMES,
    SUFFIXES,
    ExportedModel,
    is_exported,
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
