"""An exported file behind the interface of the toolboxes' inferencers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmcastling.runtime.images import PICTURES, read_image
from mmcastling.runtime.metadata import ExportedModelError
from mmcastling.runtime.model import ExportedModel
from mmcastling.runtime.postprocess import paste_masks, resize_bilinear, slide
from mmcastling.runtime.preprocess import Prepared, prepare

Source = Any
"""What :func:`mmcastling.runtime.images.read_image` takes."""


@dataclasses.dataclass(frozen=True)
class Detections:
    """What a detector found in an image, best first.

    Attributes:
        boxes: float32 ``(N, 4)`` as x1, y1, x2, y2 in pixels of the image.
        scores: float32 ``(N,)``.
        labels: int64 ``(N,)``, indices into the metadata's classes.
        masks: bool ``(N, H, W)``, or None for a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """As mmdet's ``DetInferencer`` gives it; masks as lists of rows of bools."""
        result = dict(
            labels=self.labels.tolist(),
            scores=self.scores.tolist(),
            bboxes=self.boxes.tolist(),
        )
        if self.masks is not None:
            result["masks"] = self.masks.tolist()
        return result


@dataclasses.dataclass(frozen=True)
class Classification:
    """Scores of an image's classes ``(classes,)``, which sum to one."""

    scores: np.ndarray
    classes: tuple[str, ...] = ()

    @property
    def label(self) -> int:
        """The class with the highest score."""
        return int(self.scores.argmax())

    def to_dict(self) -> dict[str, Any]:
        """As mmpretrain's ``ImageClassificationInferencer`` gives it."""
        result = dict(
            pred_scores=self.scores,
            pred_label=self.label,
            pred_score=float(self.scores[self.label]),
        )
        if self.classes:
            result["pred_class"] = self.classes[self.label]
        return result


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The class of every pixel.

    Attributes:
        labels: int64 ``(H, W)``, indices into the metadata's classes.
        logits: float32 ``(classes, H, W)``.
    """

    labels: np.ndarray
    logits: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """As mmseg's ``MMSegInferencer`` gives it."""
        return dict(predictions=self.labels)


@dataclasses.dataclass(frozen=True)
class Features:
    """Outputs of a backbone, float32, ``(C, h, w)`` or ``(C,)`` each."""

    maps: tuple[np.ndarray, ...]

    def to_dict(self) -> dict[str, Any]:
        """By the names of the outputs."""
        return {f"feature_{index}": value for index, value in enumerate(self.maps)}


Prediction = Detections | Classification | Segmentation | Features


class ExportedInferencer:
    """From images to predictions in the image's own pixels.

    Args:
        path: The exported file.
        runtime: See :class:`ExportedModel`, as for ``threads``. Defaults to None.
        threads: Defaults to None.

    Attributes:
        model: The :class:`ExportedModel`.
        metadata: What the file says about it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        runtime: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.model = ExportedModel(path, runtime, threads)
        self.metadata = self.model.metadata
        if self.metadata.kind == "module":
            raise ExportedModelError(
                f"{path} is the module {self.metadata.name}, which says nothing about "
                "how its images are prepared: give batches to ExportedModel"
            )

    def __call__(self, inputs: Source | Sequence[Source]) -> dict[str, list[Any]]:
        """Predict as the toolboxes' inferencers do.

        Args:
            inputs: An image as :meth:`predict` takes it, a folder of images, or a list
                of images.

        Returns:
            ``{'predictions': [...]}``, a dict of plain values for each image.
        """
        return {"predictions": [self.predict(x).to_dict() for x in _listed(inputs)]}

    def predict(self, image: Source) -> Prediction:
        """Predict one image.

        Args:
            image: The path of an image file, its bytes, a Pillow image, or an array
                ``(H, W, 3)`` in BGR, ``(H, W)`` or ``(H, W, 4)`` in BGRA, 0 to 255.

        Raises:
            ExportedModelError: If the image cannot be read or the file cannot take it.
        """
        pixels = read_image(image, self.metadata)
        return self.predict_prepared(prepare(pixels, self.metadata))

    def predict_prepared(self, prepared: Prepared) -> Prediction:
        """Predict what has been preprocessed, by this or another pipeline."""
        if self.metadata.kind == "segmentor":
            return self._segment(prepared)
        outputs = self.model(prepared.batch, prepared.size)
        if self.metadata.kind == "classifier":
            return Classification(outputs["scores"][0], self.metadata.classes)
        if self.metadata.kind == "backbone":
            return Features(tuple(value[0] for value in outputs.values()))
        scale = np.array([*prepared.scale, *prepared.scale], np.float32)
        boxes = outputs["boxes"] / scale
        masks = outputs.get("masks")
        if masks is not None:
            threshold = self.metadata.mask_threshold
            masks = paste_masks(masks, boxes, prepared.original, threshold)
        return Detections(boxes, outputs["scores"], outputs["labels"], masks)

    def _segment(self, prepared: Prepared) -> Segmentation:
        options = self.metadata.segmentation
        if options.get("mode") == "slide":
            logits = slide(lambda x: self.model(x)["logits"], prepared.batch, options)
        else:
            logits = self.model(prepared.batch)["logits"]
        height, width = prepared.size
        logits = logits[0, :, :height, :width]
        corners = options.get("align_corners", False)
        logits = resize_bilinear(logits, prepared.original, corners)
        if len(logits) > 1:
            return Segmentation(logits.argmax(axis=0), logits)
        probability = 1 / (1 + np.exp(-logits[0]))
        labels = probability > options.get("threshold", 0.3)
        return Segmentation(labels.astype(np.int64), logits)


def _listed(inputs: Source | Sequence[Source]) -> list[Source]:
    if isinstance(inputs, (list, tuple)):
        return list(inputs)
    if not isinstance(inputs, (str, os.PathLike)):
        return [inputs]
    folder = Path(inputs)
    if not folder.is_dir():
        return [inputs]
    images = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not images:
        raise ExportedModelError(
            f"the folder {folder} holds no images: expected files that end in "
            f"{sorted(PICTURES)}"
        )
    return list(images)
