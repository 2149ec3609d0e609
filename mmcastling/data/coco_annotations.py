"""The part of the COCO check that runs once per annotation."""

from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from mmcastling.data.problems import has_keys, is_number, kind_of, some_of

BOX_TOLERANCE = 2.0  # px a box may leave its image, for annotations that were rounded
_KEYS = ("id", "image_id", "category_id", "bbox", "area")


def check_annotations(
    annotations: list,
    sizes: Mapping[Any, tuple | None],
    names: Mapping[Any, str],
    problems: list[str],
    *,
    classes: Container[str] | None = None,
    masks: bool | None = None,
    evaluated: bool = True,
    polygons: bool = False,
) -> tuple[int, Counter[str]]:
    """Check every annotation, with ``(width, height)`` and names by id.

    The options are as in :func:`~mmcastling.data.check_coco`. Returns how many
    annotations mmdet trains on, and what it leaves out, counted by the reason.
    """
    seen: set = set()
    kept, left_out = 0, Counter[str]()
    keys = (*_KEYS, "iscrowd") if evaluated else _KEYS
    for index, entry in enumerate(annotations):
        where = f"annotations[{index}]"
        if not has_keys(entry, keys, where, problems):
            continue
        identity, image_id, category_id, box, area = [entry[key] for key in _KEYS]
        crowd = entry.get("iscrowd")
        found = []
        try:
            if identity in seen:
                found.append(
                    "repeats an annotation id; expected each once, since the later one "
                    "replaces the earlier. Renumber the annotations."
                )
            seen.add(identity)
            if image_id not in sizes:
                found.append(
                    f"points to image_id {image_id!r}, which is not in images; "
                    f"expected one of {len(sizes)} ids such as {some_of(sizes, 3)} "
                    "(text and number differ). Add the image or remove the annotation."
                )
            if category_id not in names:
                found.append(
                    f"has category_id {category_id!r}, which is not in categories; "
                    f"expected one of {some_of(names)}. Add the category or correct "
                    "the id."
                )
        except TypeError:  # a list or an object, which cannot be looked up
            problems.append(
                f"{where} has id {identity!r}, image_id {image_id!r}, category_id "
                f"{category_id!r}; expected integers. Export the file again."
            )
            continue
        if crowd not in ((0, 1) if evaluated else (0, 1, None)):
            found.append(
                f"has iscrowd {crowd!r}; expected 0 or 1. Write 1 for a region that "
                "the evaluation should pass over, else 0."
            )
        if not is_number(area) or area < 0:
            found.append(
                f"has area {area!r}; expected a number of pixels, 0 or more. Write the "
                "area of the mask, or width x height of the box."
            )
        size = sizes.get(image_id)
        found.append(_box_problem(box, size))
        reason = None
        if not any(found):
            name = names[category_id]
            is_named = classes is None or name in classes
            reason = _left_out(entry, polygons) if is_named else f"category {name!r}"
            kept += reason is None
            left_out[reason or ""] += 1
        mask = entry.get("segmentation")
        # What is left out has no mask read in training; the evaluation reads them all.
        if masks and not mask and (reason is None or evaluated):
            found.append(
                f"has segmentation {mask!r}; expected polygons or an RLE, as the "
                "pipeline or the metric asks for masks. Add the mask, or train without "
                "masks."
            )
        elif masks is not False:
            found.append(_mask_problem(mask or [], size))
        problems += [f"{where} (id {identity}) {text}" for text in found if text]
    del left_out[""]
    return kept, left_out


def _left_out(entry: Mapping[str, Any], polygons: bool) -> str | None:
    """Why mmdet does not train on an annotation that is well-formed, if it does not."""
    if entry.get("ignore"):
        return "'ignore' is set"
    if min(entry["bbox"][2:]) < 1:
        return "a side of the box is below 1 px"
    is_coded = isinstance(entry.get("segmentation"), dict) and not entry.get("iscrowd")
    if polygons and is_coded:
        return "run-length mask, which LoadAnnotations ignores with poly2mask=False"
    return None if entry["area"] else "area is 0"


def _box_problem(box: Any, size: tuple | None) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return (
            f"has bbox {box!r}; expected four finite numbers [x, y, width, height] in "
            "pixels. Correct or remove the annotation."
        )
    x, y, w, h = box
    if w < 0 or h < 0:
        return (
            f"has bbox {box!r} with a negative side; expected [x, y, width, height]. "
            "Order the corners before subtracting them."
        )
    if size is None:
        return None
    right, bottom = size[0] + BOX_TOLERANCE, size[1] + BOX_TOLERANCE
    if min(x, y) >= -BOX_TOLERANCE and x + w <= right and y + h <= bottom:
        return None
    may_be_corners = w <= right and h <= bottom
    hint = ", or convert it if it holds corners [x1, y1, x2, y2]"
    return (
        f"has bbox {box!r}, which leaves its image of {size} (width, height) by more "
        f"than {BOX_TOLERANCE:g} px; expected [x, y, width, height] in pixels. Clip "
        f"the box to the image{hint if may_be_corners else ''}."
    )


def _mask_problem(polygons: Any, size: tuple | None) -> str | None:
    if isinstance(polygons, dict):
        return _rle_problem(polygons, size)
    if not isinstance(polygons, list):
        return (
            f"has a {kind_of(polygons)} as segmentation; expected a list of polygons "
            "or an RLE. Export the masks again."
        )
    for number, polygon in enumerate(polygons):
        if not isinstance(polygon, list):
            return (
                f"has segmentation {str(polygons)[:60]}; expected a list of polygons, "
                "each a list [x0, y0, x1, y1, ...]. Wrap a single polygon in one more "
                "pair of brackets."
            )
        if len(polygon) < 6 or len(polygon) % 2:
            return (
                f"has {len(polygon)} numbers in polygon {number}, {str(polygon)[:60]}; "
                "expected an even number and at least 6, for three corners. Remove the "
                "polygon, or write the box as four corners."
            )
        if not _are_numbers(polygon):
            return (
                f"has values in polygon {number} that are not finite numbers: "
                f"{str(polygon)[:60]}; expected pixels. Correct or remove the polygon."
            )
    return None


def _rle_problem(rle: dict[str, Any], size: tuple | None) -> str | None:
    missing = " and ".join(key for key in ("size", "counts") if key not in rle)
    if missing:
        return (
            f"has an RLE without {missing} (its keys are {sorted(rle)}); expected size "
            "[height, width] and counts. Encode the mask again."
        )
    found, counts = rle["size"], rle["counts"]
    if size and found != [size[1], size[0]]:
        return (
            f"has an RLE of size {found!r}; expected {[size[1], size[0]]}, height and "
            "width of its image. Encode the mask at the size of the image."
        )
    if isinstance(counts, str) and counts:
        return None
    if not isinstance(counts, list) or not all(
        isinstance(run, int) and run >= 0 for run in counts
    ):
        return (
            f"has RLE counts {str(counts)[:60]!r}; expected a string or a list of run "
            "lengths. Encode the mask again."
        )
    if size and sum(counts) != size[0] * size[1]:
        return (
            f"has RLE counts that sum to {sum(counts)}; expected {size[0] * size[1]}, "
            "one for each pixel of the image. Encode the mask again."
        )
    return None


def _are_numbers(values: list) -> bool:
    try:
        # A sum is not finite when one of its terms is not; it runs at C speed.
        return is_number(sum(values))
    except TypeError:
        return False
