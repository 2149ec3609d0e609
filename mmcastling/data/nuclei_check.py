"""Check a written nuclei set the way its consumers will read it, and count it."""

import contextlib
import io
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from mmcastling.data.coco_check import CocoFormatError, check_coco
from mmcastling.data.dataset_error import DatasetError
from mmcastling.data.tiling import Tile

SMALL_SIDE = 32  # COCO calls an object small below 32 * 32 px
# A rasterised area differs from the polygon's by a fraction of its border length; the
# largest fraction measured on this set is 0.124.
MAX_SHIFT = 0.25  # px^2 of area per px of border


@dataclass(frozen=True)
class SplitSummary:
    """One part of the set.

    Args:
        images: Number of tiles.
        empty_images: Tiles without a nucleus to find.
        nuclei: Annotations that count (``iscrowd`` 0).
        ignored: Slivers that the evaluation passes over (``iscrowd`` 1).
        small: Of ``nuclei``, those below 32 x 32 px in area.
        median_side: Median of the square root of the area, px.
        largest_side: Maximum of the same.
    """

    images: int
    empty_images: int
    nuclei: int
    ignored: int
    small: int
    median_side: float
    largest_side: float


@dataclass(frozen=True)
class NucleiSummary:
    """What a nuclei set holds, and whether this call wrote it."""

    out_dir: Path
    train: SplitSummary
    val: SplitSummary
    created: bool = True


def verify_nuclei(
    folder: Path, *, out_dir: Path | None = None, created: bool = True
) -> NucleiSummary:
    """Read a set back with pycocotools and check it.

    Checked are the format, that every image file has the recorded size, that masks
    decode and agree with ``area`` and ``bbox``, that no id is in both parts, and
    that no tile of one part shares a pixel with a tile of the other.

    Args:
        folder: The set.
        out_dir: Its name in the summary. Defaults to None, which means ``folder``.
        created: Copied to the summary. Defaults to True.

    Raises:
        DatasetError: One of the checks failed.
    """
    parts = {split: _read_part(folder, split) for split in ("train", "val")}
    for table in ("imgs", "anns"):
        shared = getattr(parts["train"], table).keys() & getattr(parts["val"], table)
        if shared:
            _fail(folder, f"ids {sorted(shared)[:3]} occur in train and in val")
    _check_regions(folder, parts["train"], parts["val"])
    summaries = {split: _summarise(part) for split, part in parts.items()}
    return NucleiSummary(out_dir=out_dir or folder, created=created, **summaries)


def _fail(folder: Path, problem: str) -> None:
    raise DatasetError(
        f"The nuclei set in {folder} failed its own check: {problem}. Rebuild it with "
        "--force; if that does not help, please report it with this message."
    )


def _read_part(folder: Path, split: str) -> COCO:
    ann_file = folder / "annotations" / f"instances_{split}.json"
    image_dir = folder / split
    try:
        check_coco(ann_file, image_dir=image_dir, classes=("nucleus",))
    except CocoFormatError as error:
        _fail(folder, str(error))
    with contextlib.redirect_stdout(io.StringIO()):  # COCO() prints its progress
        coco = COCO(str(ann_file))
    for image in coco.imgs.values():
        path = image_dir / image["file_name"]
        recorded = (image["width"], image["height"])
        with Image.open(path) as file:
            if file.size != recorded or file.mode != "RGB":
                _fail(folder, f"{path} is {file.size} {file.mode}, recorded {recorded}")
    for annotation in coco.anns.values():
        problem = _mask_problem(annotation, coco.annToMask(annotation))
        if problem:
            _fail(folder, f"{ann_file.name}, annotation {annotation['id']}: {problem}")
    return coco


def _mask_problem(annotation: dict[str, Any], mask: np.ndarray) -> str | None:
    """Say how polygons and their mask ``(H, W)`` contradict the rest; None if not."""
    polygons = [np.reshape(ring, (-1, 2)) for ring in annotation["segmentation"]]
    corners = np.concatenate(polygons)
    low, high = corners.min(axis=0), corners.max(axis=0)
    span = [*low, *(high - low)]
    if not np.allclose(span, annotation["bbox"], rtol=0, atol=0.011):
        return f"its polygons span {span}, its bbox is {annotation['bbox']}"
    if low.min() < 0 or np.any(high > mask.shape[::-1]):
        return f"its polygons span {span} and leave the image"
    area, pixels = annotation["area"], int(mask.sum())
    if abs(pixels - area) > MAX_SHIFT * sum(map(_perimeter, polygons)):
        return f"its mask has {pixels} px, its area is {area}"
    return None


def _perimeter(corners: np.ndarray) -> float:
    sides = corners - np.roll(corners, 1, axis=0)
    return float(np.linalg.norm(sides, axis=1).sum())


def _check_regions(folder: Path, train: COCO, val: COCO) -> None:
    val_tiles = [_tile(image) for image in val.imgs.values()]
    for image in train.imgs.values():
        tile = _tile(image)
        for other in val_tiles:
            if tile.overlaps(other):
                _fail(folder, f"{tile} is in train and overlaps {other} of val")


def _tile(image: dict[str, Any]) -> Tile:
    return Tile(image["slide"], image["x"], image["y"], image["width"])


def _summarise(coco: COCO) -> SplitSummary:
    counted = [entry for entry in coco.anns.values() if not entry["iscrowd"]]
    sides = [entry["area"] ** 0.5 for entry in counted]
    return SplitSummary(
        images=len(coco.imgs),
        empty_images=len(coco.imgs.keys() - {entry["image_id"] for entry in counted}),
        nuclei=len(counted),
        ignored=len(coco.anns) - len(counted),
        small=sum(side < SMALL_SIDE for side in sides),
        median_side=round(statistics.median(sides), 1) if sides else 0.0,
        largest_side=round(max(sides), 1) if sides else 0.0,
    )
