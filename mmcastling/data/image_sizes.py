"""Sizes of images from their headers, turned as the loader turns them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

_ORIENTATION = 0x0112  # EXIF; from 5 on, width and height change places


def is_upright(loading: Mapping[str, Any]) -> bool:
    """Whether ``LoadImageFromFile`` of these options turns images as EXIF says."""
    kind = loading.get("color_type", "color")
    backend = loading.get("imdecode_backend", "cv2")
    return kind in ("color", "grayscale") and backend in ("cv2", "pillow", None)


def stored_and_loaded_size(
    path: Path, upright: bool = True
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of the pixels in a file, and of the image that is loaded.

    Raises:
        OSError, SyntaxError: As Pillow does for a damaged file.
    """
    with Image.open(path) as image:
        is_turned = upright and image.getexif().get(_ORIENTATION, 1) >= 5
        return image.size, image.size[::-1] if is_turned else image.size
