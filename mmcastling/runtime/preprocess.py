"""From an image to the network's input, as the config's test pipeline does it.

:data:`STEPS` is all that a pipeline may ask for: its steps, their options and, where
not every value will do, the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from mmcastling.runtime.images import COLOUR_TYPES
from mmcastling.runtime.metadata import ExportedModelError, ExportMetadata

_CV2 = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}
PILLOW = {"nearest": 0, "bilinear": 2, "bicubic": 3, "lanczos": 1}
"""What mmcv lets Pillow do."""
_BORDERS = {
    "constant": cv2.BORDER_CONSTANT,
    "edge": cv2.BORDER_REPLICATE,
    "reflect": cv2.BORDER_REFLECT_101,
    "symmetric": cv2.BORDER_REFLECT,
}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An input of the network and how it came from its image.

    Attributes:
        batch: ``(1, C, H, W)``, normalized and padded.
        size: ``(H, W)`` of the image before it was padded for the network.
        original: ``(H, W)`` of the image that was given.
        scale: ``(x, y)``: pixels of the network per pixel of the image.
    """

    batch: np.ndarray
    size: tuple[int, int]
    original: tuple[int, int]
    scale: tuple[float, float]


def prepare(image: np.ndarray, metadata: ExportMetadata) -> Prepared:
    """Resize, normalize and pad an image.

    Args:
        image: ``(H, W, C)``, or ``(H, W)`` of one channel, colours in BGR, as
            :func:`mmcastling.runtime.images.read_image` gives it.
        metadata: What the exported file says.
    """
    original = image.shape[:2]
    scale = (1.0, 1.0)
    for step in metadata.pipeline:
        before = image.shape[:2]
        image = STEPS[step["type"]].run(image, step)
        if step["type"].startswith("Resize"):
            height, width = image.shape[:2]
            scale = scale[0] * width / before[1], scale[1] * height / before[0]
    return Prepared(_normalize(image, metadata), image.shape[:2], original, scale)


def _normalize(image: np.ndarray, metadata: ExportMetadata) -> np.ndarray:
    """The batch ``(1, C, H, W)`` of one resized image, padded for the network."""
    image = image[..., None] if image.ndim == 2 else image
    if metadata.to_rgb and image.shape[2] == 3:
        image = image[..., ::-1]
    values = image.transpose(2, 0, 1).astype(np.float32)
    if metadata.mean is not None:
        mean, std = np.float32([metadata.mean, metadata.std])[..., None, None]
        values = (values - mean) / std
    sides = np.maximum(values.shape[1:], metadata.pad_size or 0)
    sides = sides + -sides % metadata.pad_divisor
    below, right = sides - values.shape[1:]
    return np.pad(
        values, ((0, 0), (0, below), (0, right)), constant_values=metadata.pad_value
    )[None]


def _load(image: np.ndarray, step: Any) -> np.ndarray:
    return image.astype(np.float32) if step.get("to_float32") else image


def _resize_to(image: np.ndarray, size: tuple[int, int], step: Any) -> np.ndarray:
    """To ``(W, H)``."""
    name = step.get("interpolation", "bilinear")
    if step.get("backend", "cv2") == "pillow":
        from PIL import Image

        if image.dtype != np.uint8:
            raise ExportedModelError(
                f"the pipeline resizes with Pillow, which takes whole numbers from 0 "
                f"to 255, and the image is {image.dtype}: convert it to uint8"
            )
        return np.asarray(Image.fromarray(image).resize(size, PILLOW[name]))
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
    value = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 4
    border = _BORDERS[step.get("padding_mode", "constant")]
    return cv2.copyMakeBorder(image, 0, below, 0, right, border, value=value)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a pipeline that is done here.

    Attributes:
        run: From an image and the step to the image behind it.
        options: What ``run`` heeds, with the values that it knows, or None for all.
        no_image: Options that change no pixel of an image.
    """

    run: Callable[[np.ndarray, Any], np.ndarray]
    options: Mapping[str, tuple[Any, ...] | None]
    no_image: tuple[str, ...] = ()


_RESIZING = dict(backend=("cv2", "pillow"), interpolation=tuple(_CV2))

STEPS = {
    "LoadImageFromFile": Step(
        _load,
        dict(color_type=COLOUR_TYPES, to_float32=None, imdecode_backend=("cv2",)),
        ("backend_args", "file_client_args", "ignore_empty"),
    ),
    "Resize": Step(
        _resize,
        dict(scale=None, scale_factor=(None,), keep_ratio=None, **_RESIZING),
        ("clip_object_border",),
    ),
    "ResizeEdge": Step(
        _resize_edge,
        dict(scale=None, edge=("short", "long", "width", "height"), **_RESIZING),
    ),
    "CenterCrop": Step(
        _center_crop,
        dict(crop_size=None, auto_pad=(False,)),
        ("clip_object_border", "pad_cfg"),
    ),
    "Pad": Step(
        _pad,
        dict(size=None, size_divisor=None, pad_to_square=None, pad_val=None)
        | dict(padding_mode=tuple(_BORDERS)),
    ),
}
"""Steps of a pipeline that are done here, by the names of their types."""
