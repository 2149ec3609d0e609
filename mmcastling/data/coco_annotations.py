"""The part of the COCO check that runs once per annotation, so it is kept fast."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmcastling.data.coco_messages import ENTRY
from mmcastling.data.problems import some_of

BOX_TOLERANCE = 2.0  # px a box may leave its image, for annotations that were rounded
_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def check_annotations(
    annotations: list[Any],
    sizes: Mapping[Any, tuple | None],
    names: Mapping[Any, str],
    problems: list[str],
) -> None:
    """Check every annotation, with ``(width, height)`` and names by id."""
    seen: set = set()

    def note(problem: str) -> None:
        problems.append(f"annotations[{index}] (id {identity}) {problem}")

    for index, entry in enumerate(annotations):
        try:
            identity, image_id, category_id, box, area, crowd = [
                entry[key] for key in _KEYS
            ]
            has_image, has_category = image_id in sizes, category_id in names
            is_repeated = identity in seen
            seen.add(identity)
        except (KeyError, TypeError):
            where = f"annotations[{index}]"
            if has_keys(entry, _KEYS, where, problems):
                problems.append(f"{where} {ENTRY['ids'].format(**entry)}")
            continue
        if is_repeated:
            note(ENTRY["annotation twice"])
        if not has_image:
            known = dict(total=len(sizes), ids=some_of(sizes, 3))
            note(ENTRY["image"].format(id=image_id, **known))
        if not has_category:
            note(ENTRY["category"].format(id=category_id, ids=some_of(names)))
        if crowd not in (0, 1):
            note(ENTRY["crowd"].format(crowd=crowd))
        if not is_number(area) or area < 0:
            note(ENTRY["area"].format(area=area))
        size = sizes.get(image_id)
        if not _fits(box, size):
            note(_box_problem(box, size))
        segmentation = entry.get("segmentation") or []
        is_rle = isinstance(segmentation, dict)
        check = _rle_problem if is_rle else _polygon_problem
        if problem := check(segmentation, size):
            note(problem)


def _fits(box: Any, size: tuple | None) -> bool:
    """Whether a box is four finite numbers inside its image; NaN fails each sum."""
    width, height = size or (1e30, 1e30)
    try:
        x, y, w, h = box
        return (
            min(w, h) >= 0
            and min(x, y) >= -BOX_TOLERANCE
            and x + w <= width + BOX_TOLERANCE
            and y + h <= height + BOX_TOLERANCE
        )
    except (TypeError, ValueError):
        return False


def _box_problem(box: Any, size: tuple | None) -> str:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return ENTRY["box"].format(box=box)
    if box[2] < 0 or box[3] < 0:
        return ENTRY["negative box"].format(box=box)
    is_small = size and box[2] <= size[0] + 2 and box[3] <= size[1] + 2
    hint = ", or convert it if it holds corners [x1, y1, x2, y2]" if is_small else ""
    values = dict(box=box, size=size, tolerance=BOX_TOLERANCE, hint=hint)
    return ENTRY["box outside"].format(**values)


def _polygon_problem(polygons: Any, _: tuple | None) -> str | None:
    if not isinstance(polygons, list):
        return ENTRY["mask"].format(kind=kind_of(polygons))
    for number, polygon in enumerate(polygons):
        if not isinstance(polygon, list):
            return ENTRY["bare polygon"].format(shown=str(polygons)[:60])
        if len(polygon) < 6 or len(polygon) % 2:
            values = dict(number=number, shown=str(polygon)[:60])
            return ENTRY["polygon length"].format(length=len(polygon), **values)
        try:
            # A sum is not finite when one of its terms is not; it runs at C speed.
            is_finite = is_number(sum(polygon))
        except TypeError:
            is_finite = False
        if not is_finite:
            return ENTRY["polygon values"].format(
                number=number, shown=str(polygon)[:60]
            )
    return None


def _rle_problem(rle: dict[str, Any], size: tuple | None) -> str | None:
    missing = " and ".join(key for key in ("size", "counts") if key not in rle)
    if missing:
        return ENTRY["rle keys"].format(missing=missing, keys=sorted(rle))
    found, counts = rle["size"], rle["counts"]
    if size and found != [size[1], size[0]]:
        return ENTRY["rle size"].format(found=found, expected=[size[1], size[0]])
    if isinstance(counts, str) and counts:
        return None
    if not isinstance(counts, list) or not all(
        isinstance(run, int) and run >= 0 for run in counts
    ):
        return ENTRY["rle counts"].format(shown=str(counts)[:60])
    if size and sum(counts) != size[0] * size[1]:
        return ENTRY["rle sum"].format(found=sum(counts), expected=size[0] * size[1])
    return None


def has_keys(entry: Any, keys: Sequence[str], where: str, problems: list[str]) -> bool:
    """Whether an entry is an object with these keys; notes what is missing."""
    if not isinstance(entry, dict):
        problems.append(f"{where} {ENTRY['no object'].format(kind=kind_of(entry))}")
        return False
    missing = [key for key in keys if key not in entry]
    if missing:
        hint = "Export the file in COCO's instance format"
        if missing == ["iscrowd"]:
            hint = "Write 0; the evaluation fails without it"
        names = dict(missing=", ".join(missing), keys=", ".join(keys), hint=hint)
        message = ENTRY["no keys"].format(id=entry.get("id"), **names)
        problems.append(f"{where} {message}")
    return not missing


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; a bool is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value - value == 0


def kind_of(value: Any) -> str:
    """JSON's word for a value's type."""
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean"}
    return "null" if value is None else kinds.get(type(value), "number")
