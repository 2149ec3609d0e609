"""Check a written nuclei set the way its consumers will read it, and count it."""

import contextlib
import io
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from mmcastling.data.coco_check import check_coco
from mmcastling.data.problems import DatasetError

# A rasterised area differs from the polygon's by a fraction of its border length; the
# largest fraction measured on this set is 0.124.
MAX_SHIFT = 0.25  # px^2 of area per px of border


class SplitSummary(NamedTuple):
    """How much one part of the set holds."""

    images: int  # tiles
    nuclei: int  # annotations that count, with iscrowd 0
    ignored: int  # slivers that the evaluation passes over, with iscrowd 1


def verify_nuclei(folder: Path) -> dict[str, SplitSummary]:
    """Read a set back with pycocotools and check it; what ``train`` and ``val`` hold.

    Checked are the format, that every image file has the recorded size, that masks
    decode and agree with ``area`` and ``bbox``, that no id is in both parts, and
    that no tile of one part shares a pixel with a tile of the other.

    Raises:
        DatasetError: One of the checks failed.
    """
    try:
        train, val = (_read_part(folder, split) for split in ("train", "val"))
        for one, other in ((train.imgs, val.imgs), (train.anns, val.anns)):
            if shared := sorted(one.keys() & other.keys()):
                raise DatasetError(f"ids {shared[:3]} occur in train and in val")
        for tile, other in product(train.imgs.values(), val.imgs.values()):
            if overlap(tile, other):
                raise DatasetError(f"{tile} is in train and overlaps {other} of val")
    except DatasetError as error:
        raise DatasetError(
            f"The nuclei set in {folder} failed its own check: {error}. Rebuild it "
            "with --force; if that does not help, please report it with this message."
        ) from error
    return {"train": _summarise(train), "val": _summarise(val)}


def _summarise(part: COCO) -> SplitSummary:
    ignored = sum(entry["iscrowd"] for entry in part.anns.values())
    return SplitSummary(len(part.imgs), len(part.anns) - ignored, ignored)


def overlap(tile: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two tiles' entries share at least one pixel of the same slide."""
    return tile["slide"] == other["slide"] and all(
        tile[low] < other[low] + other[side] and other[low] < tile[low] + tile[side]
        for low, side in (("x", "width"), ("y", "height"))
    )


def _read_part(folder: Path, split: str) -> COCO:
    ann_file = folder / "annotations" / f"instances_{split}.json"
    check_coco(ann_file, image_dir=folder / split, classes=("nucleus",))
    with contextlib.redirect_stdout(io.StringIO()):  # COCO() prints its progress
        coco = COCO(str(ann_file))
    for image in coco.imgs.values():
        path = folder / split / image["file_name"]
        recorded = image["width"], image["height"]
        with Image.open(path) as file:
            found = f"{file.size} {file.mode}"
        if found != f"{recorded} RGB":
            raise DatasetError(f"{path} is {found}, recorded {recorded}")
    for entry in coco.anns.values():
        if problem := _mask_problem(entry, coco.annToMask(entry)):
            raise DatasetError(f"{ann_file.name}, annotation {entry['id']}: {problem}")
    return coco


def _mask_problem(annotation: dict[str, Any], mask: np.ndarray) -> str | None:
    """Say how polygons and their mask ``(H, W)`` contradict the rest; None if not."""
    polygons = [np.reshape(ring, (-1, 2)) for ring in annotation["segmentation"]]
    corners = np.concatenate(polygons)
    low, high = corners.min(axis=0), corners.max(axis=0)
    span = [*low, *(high - low)]
    if not np.allclose(span, annotation["bbox"], rtol=0, atol=0.011):
        return f"its polygons span {span}, its bbox is {annotation['bbox']}"
    area, pixels = annotation["area"], int(mask.sum())
    sides = (corners - np.roll(corners, 1, axis=0) for corners in polygons)
    border = sum(np.linalg.norm(side, axis=1).sum() for side in sides)
    if abs(pixels - area) > MAX_SHIFT * border:
        return f"its mask has {pixels} px, its area is {area}"
    return None
