"""Check a COCO annotation file before a training run depends on it.

Detectors meet a bad annotation hours into a run, or drop it in silence. This reads the
file once, in plain Python, and reports the first few problems in words: which entry,
what was expected and what to do. Most of the time goes into the JSON parser.
"""

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmcastling.data.coco_annotations import check_annotations
from mmcastling.data.image_sizes import stored_and_loaded_size
from mmcastling.data.problems import (
    CocoFormatError,
    has_keys,
    is_number,
    kind_of,
    raise_if_any,
    some_of,
)
from mmcastling.errors import OptionError

HEADERS = 5000
"""Images whose headers are read, evenly spaced: half a second of a local disk."""

_HOW_TO_GET_COCO = (
    "Get COCO from https://cocodataset.org or with mmdet's "
    "`tools/misc/download_dataset.py --dataset-name coco2017 --unzip`."
)


def check_coco(
    ann_file: str | os.PathLike,
    *,
    image_dir: str | os.PathLike | None = None,
    classes: Sequence[str] | None = None,
    masks: bool | None = None,
    evaluated: bool = True,
    upright: bool = True,
    polygons: bool = False,
) -> list[str]:
    """Check that mmdet trains what an annotation file in COCO's format says.

    Args:
        ann_file: The JSON file.
        image_dir: Folder that ``file_name`` is relative to; every image must be there
            and, by the headers of up to 5,000, as large as the file says. Defaults to
            None, which does not look.
        classes: Class names of the config, which must be categories of the file, in
            its order; further categories are left out. Defaults to None, all of them.
        masks: Whether every annotation must have a mask, or masks are of no concern.
            Defaults to None, which checks those that are there.
        evaluated: Whether detections are compared with the file, which asks for more
            than training does. Defaults to True.
        upright: Whether images are turned as EXIF says when they are loaded. Defaults
            to True.
        polygons: Whether masks are loaded as polygons, for which mmdet ignores objects
            with a run-length mask. Defaults to False.

    Returns:
        Warnings: what mmdet leaves out, and which classes it cannot learn.

    Raises:
        CocoFormatError: The file or an entry is unusable; see the message.
        ValueError: ``classes`` is one string.
    """
    if isinstance(classes, str):
        raise OptionError(
            f"classes is the string {classes!r}; expected a sequence of names. Write "
            f"({classes!r},) with a comma."
        )
    # None of the many fresh objects is garbage: with 860,000 annotations, as in COCO
    # train2017, the check takes 15 s instead of 26 s while the collector pauses.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return _check(
            Path(ann_file), image_dir, classes, masks, evaluated, upright, polygons
        )
    finally:
        if was_enabled:
            gc.enable()


def _check(
    path: Path,
    image_dir: str | os.PathLike | None,
    classes: Sequence[str] | None,
    masks: bool | None,
    evaluated: bool,
    upright: bool,
    polygons: bool,
) -> list[str]:
    data = _load(path)
    if problem := _table_problem(data):
        raise CocoFormatError(f"{path} {problem}")
    problems: list[str] = []
    warnings: list[str] = []
    names = _check_categories(data, classes, problems)
    if classes is not None:
        # A class without a category is not learnt; the evaluation fails at it.
        unlearnt = problems if evaluated else warnings
        _compare_classes(list(names.values()), list(classes), problems, unlearnt)
    sizes = _check_images(data, problems)
    if image_dir is not None:
        _check_files(data["images"], Path(image_dir), problems)
        _check_sizes(data["images"], Path(image_dir), sizes, upright, problems)
    kept, left_out = check_annotations(
        *(data["annotations"], sizes, names, problems),
        classes=classes,
        masks=masks,
        evaluated=evaluated,
        polygons=polygons,
    )
    if not (kept or evaluated or problems):
        problems.append(
            f"no annotation is left to train on, of {len(data['annotations'])}: "
            f"{_counted(left_out) or 'the list is empty'}. Correct the file, or the "
            "classes of the config."
        )
    raise_if_any(problems, path, CocoFormatError)
    if left_out:
        warnings.append(
            f"{left_out.total()} of {len(data['annotations'])} annotations are left "
            f"out of training: {_counted(left_out)}"
        )
    return [f"{path}: {text}" for text in warnings]


def _counted(reasons: Counter[str]) -> str:
    shown = ", ".join(f"{count} as {why}" for why, count in reasons.most_common(5))
    return shown + (", ..." if len(reasons) > 5 else "")


# -- the file --------------------------------------------------------------------------


def _load(path: Path) -> Any:
    if not path.exists():
        raise CocoFormatError(
            f"{path} does not exist; expected a COCO annotation file. Check data_root "
            f"and ann_file in the config. {_HOW_TO_GET_COCO}"
        )
    if path.is_dir():
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
            f"again. {_HOW_TO_GET_COCO}"
        )
    if raw[:2] in (b"PK", b"\x1f\x8b"):
        raise CocoFormatError(
            f"{path} is a compressed archive; expected plain JSON. Unpack it first."
        )
    try:
        # Windows begins a file with a byte order mark; see compat.coco_eval.
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise CocoFormatError(
            f"{path} is not text at byte {error.start}; expected JSON in UTF-8. Check "
            "that ann_file names the annotations and not an image or an archive."
        ) from error
    except json.JSONDecodeError as error:
        text, at = error.doc, error.pos
        remedy = "Correct that place or export the file again"
        if at >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            remedy = "The file was probably cut off; download or export it again"
        raise CocoFormatError(
            f"{path} is not valid JSON at line {error.lineno}, column {error.colno} "
            f"(character {at} of {len(text)}): {error.msg}, near "
            f"{text[max(0, at - 30) : at + 30]!r}; expected a JSON object. {remedy}."
        ) from error


def _table_problem(data: Any) -> str | None:
    if not isinstance(data, dict):
        first = data[0] if isinstance(data, list) and data else None
        is_results = isinstance(first, dict) and "score" in first
        hint = "This looks like a file of detection results. " if is_results else ""
        return (
            f"holds a {kind_of(data)} at the top level; expected an object with "
            f"images, annotations and categories. {hint}Point ann_file at the ground "
            "truth."
        )
    for key in ("images", "annotations", "categories"):
        if key not in data:
            return (
                f"has no key {key!r} (it has {sorted(data)[:8]}); expected images, "
                "annotations and categories. Take an instances_* file; image_info_* "
                "are without ground truth."
            )
        if not isinstance(data[key], list):
            return (
                f"holds a {kind_of(data[key])} under {key!r}; expected a list. Export "
                "it in COCO's instance format."
            )
    if not data["images"]:
        return (
            "lists no images; expected at least one. Check the split or the filter it "
            "was exported with."
        )
    return None


# -- categories and images -------------------------------------------------------------


def _entries(
    data: dict[str, list], table: str, keys: Sequence[str], problems: list[str]
) -> Iterator[tuple[str, dict]]:
    """Yield place and entry of those that have all keys and an id of their own."""
    known: set = set()
    kind = {"images": "image", "categories": "category"}[table]
    for index, entry in enumerate(data[table]):
        where = f"{table}[{index}]"
        if not has_keys(entry, keys, where, problems):
            continue
        if not _is_id(entry["id"]):
            problems.append(
                f"{where} has id {entry['id']!r}; expected an integer. Renumber the "
                "entries."
            )
        elif entry["id"] in known:
            problems.append(
                f"{where} repeats {kind} id {entry['id']!r}; expected each once. "
                "Remove one, or renumber it together with the annotations that mean it."
            )
        else:
            known.add(entry["id"])
            yield where, entry


def _check_categories(
    data: dict[str, list], classes: Sequence[str] | None, problems: list[str]
) -> dict[Any, str]:
    """Return category names by id."""
    names: dict[Any, str] = {}
    for where, entry in _entries(data, "categories", ("id", "name"), problems):
        name = entry["name"]
        if name in names.values() and (classes is None or name in classes):
            problems.append(
                f"{where} repeats the name {name!r}; expected each class "
                "once. Merge the two and renumber their annotations."
            )
        names[entry["id"]] = name
    return names


def _compare_classes(
    names: list[str], classes: list[str], problems: list[str], unlearnt: list[str]
) -> None:
    """Compare the names of categories, in the file's order, with a config's classes.

    mmdet numbers those categories that are classes in the order of the file.
    """
    used = list(dict.fromkeys(name for name in names if name in classes))
    missing = [name for name in classes if name not in names]
    if not used:
        problems.append(
            f"none of the file's {len(names)} categories is among the config's "
            f"classes: the categories are {some_of(names)}; the classes are "
            f"{some_of(classes)}. Set metainfo=dict(classes=...) of the dataset to the "
            "names of this file, and num_classes of the heads to their number."
        )
    elif used == classes[: len(used)]:
        if missing:
            unlearnt.append(
                f"{len(missing)} of {len(classes)} classes have no category: "
                f"{some_of(missing)}; the file's categories are {some_of(names)}. "
                "Correct the spelling, or remove the classes from the config."
            )
    else:
        problems.append(
            f"the classes {some_of(classes)} are not in the order of the file's "
            f"categories, {some_of(used)}, by which mmdet numbers them: each would "
            f"have another's name. Set metainfo=dict(classes=({_listed(used)})) of all "
            "datasets."
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return shown + (", ..." if names[10:] else "," if len(names) == 1 else "")


def _is_id(value: Any) -> bool:
    return isinstance(value, str) or is_number(value)


def _check_images(
    data: dict[str, list], problems: list[str]
) -> dict[Any, tuple | None]:
    """Return ``(width, height)`` by image id; None for a size that is unusable."""
    ids = (entry.get("id") for entry in data["images"] if isinstance(entry, dict))
    sizes: dict = dict.fromkeys(key for key in ids if _is_id(key))
    keys = ("id", "file_name", "width", "height")
    for where, entry in _entries(data, "images", keys, problems):
        width, height = entry["width"], entry["height"]
        if all(is_number(side) and side > 0 for side in (width, height)):
            sizes[entry["id"]] = width, height
        else:
            problems.append(
                f"{where} (id {entry['id']}, {entry['file_name']}) has width {width!r} "
                f"and height {height!r}; expected positive numbers. Write the size of "
                "the image file."
            )
    return sizes


def _check_files(images: list, folder: Path, problems: list[str]) -> None:
    if not folder.is_dir():
        problems.append(
            f"the image folder {folder} does not exist or is not a folder; expected "
            f"the {len(images)} images of this file in it. Check data_root and "
            f"data_prefix in the config. {_HOW_TO_GET_COCO}"
        )
        return
    # One listing instead of a question per image: 118,000 of them are slow on NFS.
    listed = set(os.listdir(folder))
    names = (entry.get("file_name") for entry in images if isinstance(entry, dict))
    missing = [
        name
        for name in names
        if isinstance(name, str)
        and name not in listed
        and not ("/" in name and (folder / name).is_file())
    ]
    if missing:
        problems.append(
            f"{len(missing)} of {len(images)} images are not in {folder}, first "
            f"{some_of(missing, 3)}; the folder has {len(listed)} entries. Check "
            f"data_prefix in the config, or complete the download. {_HOW_TO_GET_COCO}"
        )


def _check_sizes(
    images: list, folder: Path, sizes: dict, upright: bool, problems: list[str]
) -> None:
    """Compare sizes with the images' own: boxes of others lie elsewhere."""
    step = -(-len(images) // HEADERS) or 1

    def examine(entry: Any) -> str | None:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            return None
        size = sizes.get(entry["id"])
        if size is None or not isinstance(entry.get("file_name"), str):
            return None
        path = folder / entry["file_name"]
        try:
            stored, loaded = stored_and_loaded_size(path, upright)
        except (OSError, SyntaxError):  # missing, or of a kind that Pillow cannot read
            return None
        if size == loaded:
            return None
        said = f"{path} is annotated as {size[0]}x{size[1]} (width x height)"
        if size == stored:
            return (
                f"{said}, but EXIF turns it to {loaded[0]}x{loaded[1]} when it is "
                "loaded, and boxes do not turn. Set color_type="
                "'color_ignore_orientation' of LoadImageFromFile, or store it upright."
            )
        return (
            f"{said} and is {loaded[0]}x{loaded[1]}: boxes and masks lie elsewhere. "
            "Scale the annotations with the images, or find the right images."
        )

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        problems.extend(filter(None, pool.map(examine, images[::step])))
