"""Check a COCO annotation file before a training run depends on it.

Detectors meet a bad annotation hours into a run, or drop it in silence. This reads the
file once, in plain Python, and reports the first few problems in words: which entry,
what was expected and what to do. Most of the time goes into the JSON parser.
"""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcastling.data.coco_annotations import check_annotations
from mmcastling.data.coco_problems import (
    CocoFormatError,
    Problems,
    has_keys,
    is_new_id,
    is_number,
    kind_of,
    some_of,
)

HOW_TO_GET_COCO = (
    "Get COCO from https://cocodataset.org or with mmdet's "
    "`tools/misc/download_dataset.py --dataset-name coco2017 --unzip`"
)


@dataclass(frozen=True)
class CocoSummary:
    """What a valid annotation file holds.

    Args:
        ann_file: The file.
        classes: Category names, in the order of the file.
        images: Number of images.
        annotations: Number of annotations, crowds included.
        crowds: Annotations with ``iscrowd`` 1, which the evaluation passes over.
        degenerate: Annotations that are not crowds and have a side below 1 px or no
            area; mmdet skips them in training (COCO train2017 has two).
        with_segmentation: Annotations with a mask.
        empty_images: Images without an annotation that is not a crowd.
    """

    ann_file: Path
    classes: tuple[str, ...]
    images: int
    annotations: int
    crowds: int
    degenerate: int
    with_segmentation: int
    empty_images: int


def check_coco(
    ann_file: str | os.PathLike,
    *,
    image_dir: str | os.PathLike | None = None,
    classes: Sequence[str] | None = None,
    max_errors: int = 5,
) -> CocoSummary:
    """Check an instance annotation file in COCO's format.

    Args:
        ann_file: The JSON file.
        image_dir: Folder that ``file_name`` is relative to; every image must be there
            (contents are not read). Defaults to None, which does not look.
        classes: Class names of the config; the file's categories must be the same set.
            Defaults to None, which accepts any.
        max_errors: Problems to spell out; the rest is counted. Defaults to 5.

    Returns:
        Counts of what the file holds.

    Raises:
        CocoFormatError: The file or an entry is unusable; see the message.
        ValueError: ``max_errors`` is not positive, or ``classes`` is one string.
    """
    if max_errors < 1:
        raise ValueError(f"max_errors is {max_errors}; expected at least 1.")
    if isinstance(classes, str):
        raise ValueError(
            f"classes is the string {classes!r}; expected a sequence of names. Write "
            f"({classes!r},) with a comma."
        )
    with _collector_paused():
        return _check(Path(ann_file), image_dir, classes, max_errors)


def _check(
    path: Path,
    image_dir: str | os.PathLike | None,
    classes: Sequence[str] | None,
    max_errors: int,
) -> CocoSummary:
    data = _load(path)
    _check_top_level(path, data)

    problems = Problems(max_errors)
    names = _check_categories(data["categories"], classes, problems)
    sizes = _check_images(data["images"], problems)
    if image_dir is not None:
        _check_files(data["images"], Path(image_dir), problems)
    counts = check_annotations(data["annotations"], sizes, names, problems)
    problems.raise_if_any(path)
    return CocoSummary(
        ann_file=path,
        classes=tuple(names.values()),
        images=len(sizes),
        annotations=len(data["annotations"]),
        **counts,
    )


def _load(path: Path) -> Any:
    if not path.exists():
        raise CocoFormatError(
            f"{path} does not exist; expected a COCO annotation file. Check data_root "
            f"and ann_file in the config. {HOW_TO_GET_COCO}."
        )
    if not path.is_file():
        raise CocoFormatError(
            f"{path} is a folder; expected a COCO annotation file such as "
            "annotations/instances_val2017.json. Point ann_file at the file."
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CocoFormatError(
            f"{path} cannot be read ({error}); expected a readable JSON file. Check "
            "its permissions."
        ) from error
    if not raw.strip():
        raise CocoFormatError(
            f"{path} is empty ({len(raw)} bytes); expected JSON. Download or export it "
            f"again. {HOW_TO_GET_COCO}."
        )
    if raw[:2] in (b"PK", b"\x1f\x8b"):
        raise CocoFormatError(
            f"{path} is a compressed archive; expected plain JSON. Unpack it first."
        )
    try:
        # Text, not bytes: json strips a byte order mark from bytes, pycocotools cannot.
        return json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(error.doc.rstrip()) or error.msg.startswith(
            "Unterminated"
        )
        remedy = (
            "The file was probably cut off; download or export it again"
            if cut_off
            else "Correct that place or export the file again"
        )
        raise CocoFormatError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} "
            f"(character {error.pos} of {len(error.doc)}): {error.msg}, near "
            f"{error.doc[max(0, error.pos - 30) : error.pos + 30]!r}; expected a JSON "
            f"object. {remedy}."
        ) from error
    except UnicodeDecodeError as error:
        raise CocoFormatError(
            f"{path} is not text at byte {error.start}; expected JSON in UTF-8. Check "
            "that ann_file names the annotations and not an image or an archive."
        ) from error


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep the garbage collector from walking a growing pile of fresh objects.

    None of them is garbage. With 860,000 annotations, as in COCO train2017, the check
    takes 15 s instead of 26 s, of which 3 s are not spent in the JSON parser.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_top_level(path: Path, data: Any) -> None:
    if not isinstance(data, dict):
        hint = "Point ann_file at the ground truth."
        first = data[0] if isinstance(data, list) and data else None
        if isinstance(first, dict) and "score" in first:
            hint = "This looks like a file of detection results. " + hint
        raise CocoFormatError(
            f"{path} holds a {kind_of(data)} at the top level; expected an object with "
            f"images, annotations and categories. {hint}"
        )
    for key in ("images", "annotations", "categories"):
        if key not in data:
            hint = "Export it in COCO's instance format."
            if key == "annotations":
                hint = (
                    "Files named image_info_* list a test set without ground truth; "
                    "take an instances_* file."
                )
            raise CocoFormatError(
                f"{path} has no key {key!r} (it has {sorted(data)[:8]}); expected "
                f"images, annotations and categories. {hint}"
            )
        if not isinstance(data[key], list):
            raise CocoFormatError(
                f"{path} holds a {kind_of(data[key])} under {key!r}; expected a list. "
                "Export it in COCO's instance format."
            )
    if not data["images"]:
        raise CocoFormatError(
            f"{path} lists no images; expected at least one. Check the split or the "
            "filter it was exported with."
        )


def _check_categories(
    categories: list[Any], classes: Sequence[str] | None, problems: Problems
) -> dict[Any, str]:
    """Return category names by id."""
    names: dict[Any, str] = {}
    for index, entry in enumerate(categories):
        where = f"categories[{index}]"
        if not has_keys(entry, ("id", "name"), where, problems):
            continue
        if not is_new_id(entry["id"], names, where, "category", problems):
            continue
        if entry["name"] in names.values():
            problems.add(
                f"{where} repeats the name {entry['name']!r}; expected each class "
                "once. Merge the two and renumber their annotations."
            )
        names[entry["id"]] = entry["name"]
    if classes is None:
        return names
    unknown = [name for name in names.values() if name not in classes]
    missing = [name for name in classes if name not in names.values()]
    if unknown:
        problems.add(
            f"{len(unknown)} of {len(names)} category names are not in the config's "
            f"classes: {some_of(unknown)}; the classes are {some_of(classes)}. Set "
            "metainfo=dict(classes=...) of the dataset to the names of this file, and "
            "num_classes of the heads to their number."
        )
    if missing:
        problems.add(
            f"{len(missing)} of {len(classes)} classes have no category: "
            f"{some_of(missing)}; the file's categories are {some_of(names.values())}. "
            "Correct the spelling, or remove the classes from the config."
        )
    return names


def _check_images(images: list[Any], problems: Problems) -> dict[Any, tuple | None]:
    """Return ``(width, height)`` by image id; None for a size that is unusable."""
    sizes: dict[Any, tuple | None] = {}
    for index, entry in enumerate(images):
        where = f"images[{index}]"
        if not has_keys(entry, ("id", "file_name", "width", "height"), where, problems):
            if isinstance(entry, dict) and isinstance(entry.get("id"), int | str):
                sizes.setdefault(entry["id"], None)
            continue
        if not is_new_id(entry["id"], sizes, where, "image", problems):
            continue
        size = entry["width"], entry["height"]
        if not all(is_number(side) and side > 0 for side in size):
            problems.add(
                f"{where} (id {entry['id']}, {entry['file_name']}) has width "
                f"{size[0]!r} and height {size[1]!r}; expected positive numbers. Write "
                "the size of the image file."
            )
            size = None
        sizes[entry["id"]] = size
    return sizes


def _check_files(images: list[Any], folder: Path, problems: Problems) -> None:
    if not folder.is_dir():
        problems.add(
            f"the image folder {folder} does not exist or is not a folder; expected "
            f"the {len(images)} images of this file in it. Check data_root and "
            f"data_prefix in the config. {HOW_TO_GET_COCO}."
        )
        return
    # One listing instead of a question per image: 118,000 of them are slow on NFS.
    listed = {entry.name for entry in os.scandir(folder)}
    missing = []
    for entry in images:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in listed:
            continue
        if "/" not in name or not (folder / name).is_file():
            missing.append(name)
    if missing:
        problems.add(
            f"{len(missing)} of {len(images)} images are not in {folder}, first "
            f"{some_of(missing, 3, 'file')}; the folder has {len(listed)} entries. "
            "Check data_prefix in the config, or complete the download. "
            f"{HOW_TO_GET_COCO}."
        )
