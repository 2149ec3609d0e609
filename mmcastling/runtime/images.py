"""Images from files, bytes, arrays and Pillow, as a config's pipeline reads them."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mmcastling.errors import UnavailableError
from mmcastling.runtime.metadata import ExportedModelError, ExportMetadata

try:
    import cv2
except ImportError as error:
    raise UnavailableError(
        f"pictures are read with OpenCV ({error}): pip install opencv-python-headless"
    ) from error

logger = logging.getLogger("mmcastling")

_FLAGS = {
    "color": cv2.IMREAD_COLOR,
    "grayscale": cv2.IMREAD_GRAYSCALE,
    "unchanged": cv2.IMREAD_UNCHANGED,
    "color_ignore_orientation": cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
    "grayscale_ignore_orientation": cv2.IMREAD_GRAYSCALE
    | cv2.IMREAD_IGNORE_ORIENTATION,
}
COLOUR_TYPES = tuple(_FLAGS)
"""How files are read, by mmcv's names; ``'unchanged'`` keeps channels and 16 bits."""

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
"""How the names of pictures end, in small letters."""

_TO_GREY = {3: cv2.COLOR_BGR2GRAY, 4: cv2.COLOR_BGRA2GRAY}


def read_image(source: Any, metadata: ExportMetadata | None = None) -> np.ndarray:
    """An image ``(H, W, C)``, or ``(H, W)`` of one channel, colours in BGR.

    Args:
        source: The path of a file, the bytes of one, a Pillow image, or an array
            ``(H, W)`` or ``(H, W, C)`` in BGR or BGRA, 0 to 255. Grey becomes colour,
            colour grey, and alpha is dropped, as it is for files.
        metadata: Of the exported file, which says how its config reads files. Defaults
            to None (colour of 8 bits, turned as the camera was held).

    Raises:
        ExportedModelError: If the file is missing or no image, or an array is none.
    """
    steps = metadata.pipeline if metadata else ()
    reading = next((s for s in steps if s["type"] == "LoadImageFromFile"), {})
    kind = reading.get("color_type", "color")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(np.frombuffer(source, np.uint8), kind, f"of {len(source)} bytes")
    if isinstance(source, (str, os.PathLike)):
        return _read(source, kind)
    if hasattr(source, "getbands"):
        source = _from_pillow(source, upright=kind in ("color", "grayscale"))
    if not isinstance(source, np.ndarray):
        raise ExportedModelError(
            f"an image must be a path, bytes, a Pillow image or an array (H, W, C) in "
            f"BGR, got {type(source).__name__}: for a tensor (C, H, W) in RGB pass "
            "x.flip(0).permute(1, 2, 0).numpy(), with values from 0 to 255"
        )
    channels = metadata.channels if metadata else 3
    return with_channels(_checked(source, kind), channels)


def _read(source: str | os.PathLike[str], kind: str) -> np.ndarray:
    path = Path(source)
    if not path.is_file():
        if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
            raise ExportedModelError(
                f"image {source} is an address: download it, and pass the file or its "
                "bytes"
            )
        raise ExportedModelError(f"image {path} does not exist: check the path")
    data = np.fromfile(path, np.uint8)
    return _decode(data, kind, f"{path} ({data.size} bytes)")


def _decode(data: np.ndarray, kind: str, name: str) -> np.ndarray:
    image = cv2.imdecode(data, _FLAGS[kind]) if data.size else None
    if image is None:
        raise ExportedModelError(
            f"image {name} cannot be read: it is damaged, or no image of the kind that "
            "its name says"
        )
    return image


def _from_pillow(image: Any, upright: bool) -> np.ndarray:
    if upright:
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image)
    if image.mode not in ("L", "I;16", "I", "F", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    array = np.asarray(image)
    return array if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]


def _checked(image: np.ndarray, kind: str) -> np.ndarray:
    """An array of a type that OpenCV works on, or what to pass in its place."""
    image = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    if image.size == 0 or (image.ndim != 2 and image.shape[2:] not in ((3,), (4,))):
        hint = ""
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):
            hint = "; for (C, H, W) in RGB pass image[::-1].transpose(1, 2, 0)"
        elif image.ndim == 4:
            hint = "; pass a list of images, not a batch"
        raise ExportedModelError(
            f"an image must be an array (H, W), (H, W, 3) in BGR or (H, W, 4) in BGRA, "
            f"got {image.shape}{hint}"
        )
    if image.dtype.kind not in "uif":
        raise ExportedModelError(
            f"an image must hold numbers from 0 to 255, got an array of {image.dtype}: "
            "pass image.astype(np.uint8) * 255 for a mask"
        )
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    low, high = image.min(), image.max()
    if image.dtype.kind == "f":
        if not np.isfinite([low, high]).all():
            raise ExportedModelError("an image must hold finite numbers, got NaN")
        if 0 < high <= 1:
            logger.warning(
                "an image of %s has no number above 1: it is taken as nearly black; "
                "if its white is 1, pass image * 255",
                image.dtype,
            )
        return np.ascontiguousarray(image, dtype=np.float32)
    wide = kind == "unchanged"  # 16 bits a channel reach the network
    if low < 0 or high > (65535 if wide else 255):
        raise ExportedModelError(
            f"an image must hold numbers from 0 to {65535 if wide else 255}, got "
            f"{image.dtype} from {low} to {high}: scale it first"
        )
    keeps = wide and (image.dtype == np.uint16 or high > 255)
    return np.ascontiguousarray(image, dtype=np.uint16 if keeps else np.uint8)


def with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Grey from colour or colour from grey, without alpha; or the image as it is.

    Raises:
        ExportedModelError: If the image cannot have so many channels.
    """
    found = 1 if image.ndim == 2 else image.shape[2]
    if found == channels:
        return image
    if (found, channels) == (1, 3):
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    if (found, channels) == (4, 3):
        return np.ascontiguousarray(image[..., :3])
    if channels == 1 and found in _TO_GREY:
        return cv2.cvtColor(image, _TO_GREY[found])
    raise ExportedModelError(
        f"an image of {found} channels does not fit: this network takes {channels}"
    )
