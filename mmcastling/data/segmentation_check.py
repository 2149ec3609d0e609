"""Check a segmentation split before a training run depends on it.

A label outside the classes is an index error, on a GPU a failed assertion of a kernel,
at the iteration that happens to draw the file; a map of another size is cropped apart
from its image in silence. This reads the header of every image and every label map
once, and reports the first few problems in words.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112  # EXIF; from 5 on, width and height change places
_ID_MODES = ("L", "P", "1", "I", "I;16", "I;16B")  # one integer a pixel


class SegmentationFormatError(ValueError):
    """A split is not usable; the message lists the first problems."""


@dataclass(frozen=True)
class SegmentationSummary:
    """What a valid split holds.

    Attributes:
        images: Number of images.
        values: Values that occur in the label maps.
    """

    images: int
    values: tuple[int, ...]


def check_segmentation(
    image_dir: str | os.PathLike[str],
    label_dir: str | os.PathLike[str],
    *,
    allowed: Collection[int],
    meaning: str = "",
    image_suffix: str = ".jpg",
    label_suffix: str = ".png",
    names: Iterable[str] | None = None,
    max_errors: int = 5,
) -> SegmentationSummary:
    """Check the images and label maps of one split.

    Args:
        image_dir: Folder of the images.
        label_dir: Folder of the label maps, named as the images are.
        allowed: Values that label maps may hold.
        meaning: What they stand for, for messages. Defaults to ``''``.
        image_suffix: How names of images end. Defaults to ``'.jpg'``.
        label_suffix: How names of label maps end in its place. Defaults to ``'.png'``.
        names: Names without suffix. Defaults to None (all images of the folder and
            the folders in it).
        max_errors: Problems to spell out; the rest is counted. Defaults to 5.

    Raises:
        SegmentationFormatError: The split is missing or unusable; see the message.
    """
    image_dir, label_dir = Path(image_dir), Path(label_dir)
    for folder, what in ((image_dir, "images"), (label_dir, "label maps")):
        if not folder.is_dir():
            raise SegmentationFormatError(_missing_folder(folder, what))
    if names is None:
        names = _names(image_dir, image_suffix)
    names = list(names)
    if not names:
        raise SegmentationFormatError(
            f"{image_dir} holds no images whose names end in {image_suffix!r}; it "
            f"holds {_some(_files(image_dir))}. Set img_suffix of the dataset, or "
            "data_prefix.img_path to the folder of this split."
        )
    known = np.zeros(65536, bool)
    known[list(allowed)] = True
    expected = meaning or f"one of {sorted(allowed)}"

    def check(name: str) -> tuple[str | None, np.ndarray]:
        return _check_pair(
            image_dir / f"{name}{image_suffix}",
            label_dir / f"{name}{label_suffix}",
            known,
            expected,
        )

    # Decoding releases the interpreter's lock.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check, names))
    problems = [problem for problem, _ in results if problem]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems[:max_errors])
        rest = len(problems) - max_errors
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        noun = "problem" if len(problems) == 1 else "problems"
        raise SegmentationFormatError(
            f"{label_dir} has {len(problems)} {noun}:\n{lines}{more}"
        )
    values = np.unique(np.concatenate([found for _, found in results]))
    return SegmentationSummary(len(names), tuple(int(value) for value in values))


def _check_pair(
    image: Path, label: Path, known: np.ndarray, expected: str
) -> tuple[str | None, np.ndarray]:
    """What is wrong with an image and its label map, and the values of the map."""
    nothing = np.zeros(0, np.int64)
    if not image.is_file():
        return f"{image} does not exist. Complete the split, or its list.", nothing
    if not label.is_file():
        return (
            f"{label} does not exist, but its image {image.name} does. Add the label "
            "map or remove the image; seg_map_suffix says how its name ends."
        ), nothing
    try:
        width, height = _shown_size(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        return f"{image} is not a readable image ({error}). Export it again.", nothing
    try:
        with Image.open(label) as opened:
            mode, size = opened.mode, opened.size
            if mode not in _ID_MODES:
                return (
                    f"{label} has channels {'+'.join(opened.getbands())}; expected one "
                    "channel of class ids. Convert its colours to ids first."
                ), nothing
            if size != (width, height):
                return (
                    f"{label} is {size[0]}x{size[1]} (width x height) and its image "
                    f"{image.name} {width}x{height}; expected equal sizes. Resize the "
                    "map without interpolation, or find the right pair."
                ), nothing
            pixels = np.asarray(opened)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        return f"{label} is not a readable label map ({error}).", nothing
    values, counts = _values(pixels)
    wrong = ~known[np.clip(values, 0, known.size - 1)]
    if wrong.any():
        shown = ", ".join(
            f"{value} ({count} pixels)"
            for value, count in list(zip(values[wrong], counts[wrong], strict=True))[:3]
        )
        rest = int(wrong.sum()) - 3
        shown += f" and {rest} further values" if rest > 0 else ""
        return f"{label} holds {shown}; expected {expected}.", values
    return None, values


def _values(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if pixels.dtype == np.uint8:  # several times faster than np.unique
        counts = np.bincount(pixels.reshape(-1), minlength=256)
        values = np.flatnonzero(counts)
        return values, counts[values]
    return np.unique(pixels.astype(np.int64), return_counts=True)


def _shown_size(path: Path) -> tuple[int, int]:
    """Width and height after the rotation that a camera has noted, as mmcv loads it."""
    with Image.open(path) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) >= 5:
            width, height = height, width
    return width, height


def _names(folder: Path, suffix: str) -> list[str]:
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))


def _files(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _some(names: list[str], limit: int = 3) -> str:
    if not names:
        return "nothing"
    rest = len(names) - limit
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {rest} more" if rest > 0 else shown


def _missing_folder(folder: Path, what: str) -> str:
    above = folder.parent
    while not above.is_dir() and above != above.parent:
        above = above.parent
    return (
        f"the split's folder of {what} {folder} does not exist; {above} holds "
        f"{_some(_files(above))}. Set data_prefix of the dataset to its folders, or "
        "complete the data."
    )
