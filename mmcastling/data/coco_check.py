"""Check a COCO annotation file before a training run depends on it.

Detectors meet a bad annotation hours into a run, or drop it in silence. This reads the
file once, in plain Python, and reports the first few problems in words: which entry,
what was expected and what to do. Most of the time goes into the JSON parser.
"""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmcastling.data.coco_annotations import (
    check_annotations,
    has_keys,
    is_number,
    kind_of,
)
from mmcastling.data.coco_messages import ENTRY, FILE, SETS
from mmcastling.data.problems import CocoFormatError, raise_if_any, some_of
from mmcastling.errors import OptionError

_KINDS = {"images": "image", "categories": "category"}


def check_coco(
    ann_file: str | os.PathLike,
    *,
    image_dir: str | os.PathLike | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Check an instance annotation file in COCO's format.

    Args:
        ann_file: The JSON file.
        image_dir: Folder that ``file_name`` is relative to; every image must be there
            (contents are not read). Defaults to None, which does not look.
        classes: Class names of the config; the file's categories must be the same set.
            Defaults to None, which accepts any.

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
        _check(Path(ann_file), image_dir, classes)
    finally:
        if was_enabled:
            gc.enable()


def _check(
    path: Path, image_dir: str | os.PathLike | None, classes: Sequence[str] | None
) -> None:
    data = _load(path)
    _check_tables(path, data)
    problems: list[str] = []
    names = _check_categories(data, problems)
    if classes is not None:
        _compare_classes(list(names.values()), classes, problems)
    sizes = _check_images(data, problems)
    if image_dir is not None:
        _check_files(data["images"], Path(image_dir), problems)
    check_annotations(data["annotations"], sizes, names, problems)
    raise_if_any(problems, path, CocoFormatError)


def _refuse(path: Path, problem: str, **values: Any) -> NoReturn:
    raise CocoFormatError(f"{path} {FILE[problem].format(**values)}")


def _load(path: Path) -> Any:
    if not path.exists():
        _refuse(path, "missing")
    if not path.is_file():
        _refuse(path, "folder")
    try:
        raw = path.read_bytes()
    except OSError as error:
        _refuse(path, "unreadable", error=error)
    if not raw.strip():
        _refuse(path, "empty", size=len(raw))
    if raw[:2] in (b"PK", b"\x1f\x8b"):
        _refuse(path, "archive")
    try:
        # Text, not bytes: json strips a byte order mark from bytes, pycocotools cannot.
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        _refuse(path, "binary", error=error)
    except json.JSONDecodeError as error:
        text, at = error.doc, error.pos
        near = text[max(0, at - 30) : at + 30]
        remedy = "Correct that place or export the file again"
        if at >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            remedy = "The file was probably cut off; download or export it again"
        values = dict(size=len(text), near=near, remedy=remedy)
        _refuse(path, "syntax", error=error, **values)


def _check_tables(path: Path, data: Any) -> None:
    if not isinstance(data, dict):
        first = data[0] if isinstance(data, list) and data else None
        is_results = isinstance(first, dict) and "score" in first
        hint = "This looks like a file of detection results. " if is_results else ""
        _refuse(path, "top level", kind=kind_of(data), hint=hint)
    for key in ("images", "annotations", "categories"):
        if key not in data:
            _refuse(path, "no key", key=key, keys=sorted(data)[:8])
        if not isinstance(data[key], list):
            _refuse(path, "no list", key=key, kind=kind_of(data[key]))
    if not data["images"]:
        _refuse(path, "no images")


def _entries(
    data: dict[str, list], table: str, keys: Sequence[str], problems: list[str]
) -> Iterator[tuple[str, dict]]:
    """Yield place and entry of those that have all keys and an id of their own."""
    known: set = set()
    for index, entry in enumerate(data[table]):
        where = f"{table}[{index}]"
        if not has_keys(entry, keys, where, problems):
            continue
        if not isinstance(entry["id"], int | str):
            problems.append(f"{where} {ENTRY['id'].format(**entry)}")
        elif entry["id"] in known:
            message = ENTRY["id twice"].format(id=entry["id"], kind=_KINDS[table])
            problems.append(f"{where} {message}")
        else:
            known.add(entry["id"])
            yield where, entry


def _check_categories(data: dict[str, list], problems: list[str]) -> dict[Any, str]:
    """Return category names by id."""
    names: dict[Any, str] = {}
    for where, entry in _entries(data, "categories", ("id", "name"), problems):
        if entry["name"] in names.values():
            problems.append(f"{where} {ENTRY['name twice'].format(**entry)}")
        names[entry["id"]] = entry["name"]
    return names


def _compare_classes(
    names: list[str], classes: Sequence[str], problems: list[str]
) -> None:
    pairs = {"unknown": (names, classes), "uncovered": (classes, names)}
    for kind, (these, others) in pairs.items():
        alone = [name for name in these if name not in others]
        if alone:
            counts = dict(count=len(alone), total=len(these))
            shown = dict(names=some_of(alone), classes=some_of(others))
            problems.append(SETS[kind].format(**counts, **shown))


def _check_images(
    data: dict[str, list], problems: list[str]
) -> dict[Any, tuple | None]:
    """Return ``(width, height)`` by image id; None for a size that is unusable."""
    ids = (entry.get("id") for entry in data["images"] if isinstance(entry, dict))
    sizes: dict = dict.fromkeys(key for key in ids if isinstance(key, int | str))
    keys = ("id", "file_name", "width", "height")
    for where, entry in _entries(data, "images", keys, problems):
        size = entry["width"], entry["height"]
        if all(is_number(side) and side > 0 for side in size):
            sizes[entry["id"]] = size
        else:
            problems.append(f"{where} {ENTRY['size'].format(**entry)}")
    return sizes


def _check_files(images: list[Any], folder: Path, problems: list[str]) -> None:
    place = dict(folder=folder, total=len(images))
    if not folder.is_dir():
        problems.append(SETS["image folder"].format(**place))
        return
    # One listing instead of a question per image: 118,000 of them are slow on NFS.
    listed = {entry.name for entry in os.scandir(folder)}
    names = (entry.get("file_name") for entry in images if isinstance(entry, dict))
    missing = [
        name
        for name in names
        if isinstance(name, str)
        and name not in listed
        and not ("/" in name and (folder / name).is_file())
    ]
    if missing:
        place |= dict(count=len(missing), entries=len(listed))
        problems.append(SETS["image files"].format(names=some_of(missing, 3), **place))
