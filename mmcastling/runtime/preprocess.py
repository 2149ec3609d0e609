"""From an image to the network's input, as the config's test pipeline does it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmcastling.runtime.metadata import ExportedModelError, ExportMetadata

_CV2 = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}
INTERPOLATIONS = tuple(_CV2)
_PILLOW = {"nearest": 0, "bilinear": 2, "bicubic": 3, "area": 4, "lanczos": 1}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An input of the network and how it came from its image.

    Attributes:
        batch: ``(1, 3, H, W)``, normalized and padded.
        size: ``(H, W)`` of the image before padding to the divisor.
        original: ``(H, W)`` of the image that was given.
        scale: ``(x, y)``: pixels of the network per pixel of the image.
    """

    batch: np.ndarray
    size: tuple[int, int]
    original: tuple[int, int]
    scale: tuple[float, float]


def read_image(source: str | os.PathLike[str] | np.ndarray) -> np.ndarray:
    """An image ``(H, W, 3)`` in BGR, 0 to 255, from a file or as it is given.

    Raises:
        ExportedModelError: If the file is missing or no image, or an array is not of
            that shape.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.size == 0:
            raise ExportedModelError(
                f"an image must be an array (H, W, 3) in BGR, got {source.shape}"
            )
        return source
    path = Path(source)
    if not path.is_file():
        raise ExportedModelError(f"image {path} does not exist: check the path")
    data = np.fromfile(path, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if image is None:
        raise ExportedModelError(
            f"image {path} ({path.stat().st_size} bytes) cannot be read: it is "
            "damaged, or no image of the kind that its name says"
        )
    return image


def prepare(image: np.ndarray, metadata: ExportMetadata) -> Prepared:
    """Resize, normalize and pad an image.

    Args:
        image: ``(H, W, 3)`` in BGR, 0 to 255.
        metadata: What the exported file says.
    """
    original = image.shape[:2]
    scale = (1.0, 1.0)
    for step in metadata.pipeline:
        before = image.shape[:2]
        image = STEPS[step["type"]](image, step)
        if step["type"].startswith("Resize"):
            height, width = image.shape[:2]
            scale = scale[0] * width / before[1], scale[1] * height / before[0]
    return Prepared(_normalize(image, metadata), image.shape[:2], original, scale)


def _normalize(image: np.ndarray, metadata: ExportMetadata) -> np.ndarray:
    """The batch ``(1, 3, H, W)`` of one resized image, padded to the divisor."""
    if metadata.to_rgb:
        image = image[..., ::-1]
    values = image.transpose(2, 0, 1).astype(np.float32)
    if metadata.mean is not None:
        mean, std = np.float32([metadata.mean, metadata.std])[..., None, None]
        values = (values - mean) / std
    below, right = (-side % metadata.pad_divisor for side in values.shape[1:])
    return np.pad(
        values, ((0, 0), (0, below), (0, right)), constant_values=metadata.pad_value
    )[None]


def _resize_to(image: np.ndarray, size: tuple[int, int], step: Any) -> np.ndarray:
    """To ``(W, H)``."""
    name = step.get("interpolation", "bilinear")
    if step.get("backend", "cv2") == "pillow":
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize(size, _PILLOW[name]))
    return cv2.resize(image, size, interpolation=_CV2[name])


def _resize(image: np.ndarray, step: Any) -> np.ndarray:
    height, width = image.shape[:2]
    scale = step["scale"]  # (W, H), or the longer and the shorter side in any order
    if not step.get("keep_ratio", False):
        return _resize_to(image, tuple(scale), step)
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    size = int(width * factor + 0.5), int(height * factor + 0.5)
    return _resize_to(image, size, step)


def _resize_edge(image: np.ndarray, step: Any) -> np.ndarray:
    height, width = image.shape[:2]
    edge, scale = step.get("edge", "short"), step["scale"]
    shorter = "width" if width < height else "height"
    longer = "width" if width > height else "height"
    edge = {"short": shorter, "long": longer}.get(edge, edge)
    if edge == "width":
        size = scale, int(scale * height / width)
    else:
        size = int(scale * width / height), scale
    return _resize_to(image, size, step)


def _center_crop(image: np.ndarray, step: Any) -> np.ndarray:
    size = step["crop_size"]
    crop_width, crop_height = (size, size) if isinstance(size, int) else size
    height, width = image.shape[:2]
    top = max(0, round((height - crop_height) / 2))
    left = max(0, round((width - crop_width) / 2))
    return image[top : top + crop_height, left : left + crop_width]


def _pad(image: np.ndarray, step: Any) -> np.ndarray:
    height, width = image.shape[:2]
    if step.get("size") is not None:
        to_width, to_height = step["size"]
    elif step.get("pad_to_square"):
        to_width = to_height = max(height, width)
    else:
        to_width, to_height = width, height
    if divisor := step.get("size_divisor"):
        to_width, to_height = (
            -(-max(side, one) // divisor) * divisor
            for side, one in ((to_width, width), (to_height, height))
        )
    below, right = max(0, to_height - height), max(0, to_width - width)
    value = step.get("pad_val", 0)
    value = value.get("img", 0) if isinstance(value, dict) else value
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    return cv2.copyMakeBorder(
        image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=value
    )


STEPS = {
    "Resize": _resize,
    "ResizeEdge": _resize_edge,
    "CenterCrop": _center_crop,
    "Pad": _pad,
}
"""Steps of a pipeline that are done here."""
