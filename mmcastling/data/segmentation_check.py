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
from pathlib import Path

import numpy as np
from PIL import Image

from mmcastling.data.image_sizes import stored_and_loaded_size
from mmcastling.data.problems import SegmentationFormatError, raise_if_any, some_of

_ID_MODES = ("L", "P", "1", "I", "I;16", "I;16B")  # one integer a pixel
_UNREADABLE = (OSError, SyntaxError)  # what Pillow raises for a damaged file


def check_segmentation(
    image_dir: str | os.PathLike[str],
    label_dir: str | os.PathLike[str],
    *,
    allowed: Collection[int],
    meaning: str = "",
    image_suffix: str = ".jpg",
    label_suffix: str = ".png",
    names: Iterable[str] | None = None,
    upright: bool = True,
) -> None:
    """Check the images and label maps of one split.

    Args:
        image_dir: Folder of the images.
        label_dir: Folder of the label maps, named as the images are.
        allowed: Values that label maps may hold.
        meaning: What they stand for, for messages. Defaults to ``''``.
        image_suffix: How names of images end. Defaults to ``'.jpg'``.
        label_suffix: How names of label maps end in its place. Defaults to ``'.png'``.
        names: Names without suffix. Defaults to None, all images below the folder.
        upright: Whether images are turned as EXIF says when they are loaded. Defaults
            to True.

    Raises:
        SegmentationFormatError: The split is missing or unusable; see the message.
    """
    image_dir, label_dir = Path(image_dir), Path(label_dir)
    for folder, what in ((image_dir, "images"), (label_dir, "label maps")):
        if not folder.is_dir():
            above = next(parent for parent in folder.parents if parent.is_dir())
            raise SegmentationFormatError(
                f"the split's folder of {what} {folder} does not exist; {above} holds "
                f"{some_of(sorted(os.listdir(above)), 3)}. Set data_prefix of the "
                "dataset to its folders, or complete the data."
            )
    names = _names(image_dir, image_suffix) if names is None else list(names)
    if not names:
        raise SegmentationFormatError(
            f"{image_dir} holds no images whose names end in {image_suffix!r}; it "
            f"holds {some_of(sorted(os.listdir(image_dir)), 3)}. Set img_suffix of the "
            "dataset, or data_prefix.img_path to the folder of this split."
        )

    def examine(name: str) -> str | None:
        image = image_dir / f"{name}{image_suffix}"
        label = label_dir / f"{name}{label_suffix}"
        expected = meaning or f"one of {sorted(allowed)}"
        return _problem(image, label, allowed, expected, upright)

    # Decoding releases the interpreter's lock.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        problems = [problem for problem in pool.map(examine, names) if problem]
    raise_if_any(problems, label_dir, SegmentationFormatError)


def _problem(
    image: Path, label: Path, allowed: Collection[int], expected: str, upright: bool
) -> str | None:
    """Say what is wrong with an image and its label map; None if nothing is."""
    if not image.is_file():
        return f"{image} does not exist. Complete the split, or its list."
    if not label.is_file():
        return (
            f"{label} does not exist, but its image {image.name} does. Add the label "
            "map or remove the image; seg_map_suffix says how its name ends."
        )
    try:
        _, size = stored_and_loaded_size(image, upright)
    except _UNREADABLE as error:
        return f"{image} is not a readable image ({error}). Export it again."
    try:
        with Image.open(label) as opened:
            bands, found = opened.getbands(), opened.size
            pixels = np.asarray(opened) if opened.mode in _ID_MODES else None
    except _UNREADABLE as error:
        return f"{label} is not a readable label map ({error})."
    if pixels is None:
        return (
            f"{label} has channels {'+'.join(bands)}; expected one channel of class "
            "ids. Convert its colours to ids first."
        )
    if found != size:
        return (
            f"{label} is {found[0]}x{found[1]} (width x height) and its image "
            f"{image.name} {size[0]}x{size[1]}; expected equal sizes. Resize the map "
            "without interpolation, or find the right pair."
        )
    if pixels.dtype == np.uint8:  # several times faster than np.unique
        counts = np.bincount(pixels.reshape(-1), minlength=256)
        pairs = [(value, counts[value]) for value in np.flatnonzero(counts)]
    else:
        pairs = list(zip(*np.unique(pixels, return_counts=True), strict=True))
    wrong = [f"{int(v)} ({n} pixels)" for v, n in pairs if int(v) not in allowed]
    if not wrong:
        return None
    more = f" and {len(wrong) - 3} further values" if wrong[3:] else ""
    return f"{label} holds {', '.join(wrong[:3])}{more}; expected {expected}."


def _names(folder: Path, suffix: str) -> list[str]:
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))
