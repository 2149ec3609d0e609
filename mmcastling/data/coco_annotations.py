"""The part of the COCO check that runs once per annotation, so it is kept fast."""

from collections.abc import Mapping
from typing import Any

from mmcastling.data.coco_problems import (
    Problems,
    has_keys,
    is_number,
    kind_of,
    some_of,
)

BOX_TOLERANCE = 2.0  # px a box may leave its image, for annotations that were rounded


def check_annotations(
    annotations: list[Any],
    sizes: Mapping[Any, tuple | None],
    names: Mapping[Any, str],
    problems: Problems,
) -> dict[str, int]:
    """Check every annotation and return the counts of the summary."""
    seen: set = set()
    filled: set = set()
    crowds = degenerate = with_segmentation = 0
    required = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    for index, entry in enumerate(annotations):
        # The good case is written for speed; words are made only for a bad one.
        try:
            identity, image_id, category_id, box, area, crowd = [
                entry[key] for key in required
            ]
            known = image_id in sizes and category_id in names
            duplicate = identity in seen
            seen.add(identity)
        except (KeyError, TypeError, IndexError):
            where = f"annotations[{index}]"
            if has_keys(entry, required, where, problems):
                problems.add(
                    f"{where} has id {entry['id']!r}, image_id {entry['image_id']!r}, "
                    f"category_id {entry['category_id']!r}; expected integers. Export "
                    "the file again."
                )
            continue
        where = f"annotations[{index}] (id {identity})"
        if duplicate:
            problems.add(
                f"{where} repeats an annotation id; expected each once, since the "
                "later one replaces the earlier. Renumber the annotations."
            )
        if not known:
            _explain_reference(where, image_id, category_id, sizes, names, problems)
        if crowd not in (0, 1):
            problems.add(
                f"{where} has iscrowd {crowd!r}; expected 0 or 1. Write 1 for a region "
                "that the evaluation should pass over, else 0."
            )
        if not is_number(area) or area < 0:
            problems.add(
                f"{where} has area {area!r}; expected a number of pixels, 0 or more. "
                "Write the area of the mask, or width x height of the box."
            )
            area = 0
        size = sizes.get(image_id)
        if not _box_fits(box, size):
            _explain_box(where, box, size, problems)
        elif crowd:
            crowds += 1
        else:
            filled.add(image_id)
            degenerate += box[2] < 1 or box[3] < 1 or area <= 0
        segmentation = entry.get("segmentation")
        if segmentation:
            with_segmentation += 1
            problem = _segmentation_problem(segmentation, size)
            if problem:
                problems.add(f"{where} {problem}")
    return {
        "crowds": crowds,
        "degenerate": degenerate,
        "with_segmentation": with_segmentation,
        "empty_images": len(sizes.keys() - filled),
    }


def _explain_reference(
    where: str,
    image_id: Any,
    category_id: Any,
    sizes: Mapping[Any, tuple | None],
    names: Mapping[Any, str],
    problems: Problems,
) -> None:
    if image_id not in sizes:
        problems.add(
            f"{where} points to image_id {image_id!r}, which is not in images; "
            f"expected one of {len(sizes)} ids such as {some_of(sizes, 3)} (text and "
            "number differ). Add the image or remove the annotation."
        )
    if category_id not in names:
        problems.add(
            f"{where} has category_id {category_id!r}, which is not in categories; "
            f"expected one of {some_of(names)}. Add the category or correct the id."
        )


def _box_fits(box: Any, size: tuple | None) -> bool:
    """Whether a box is four finite numbers inside its image; NaN fails each test."""
    width, height = size or (float("1e30"), float("1e30"))
    try:
        x, y, w, h = box
        return (
            w >= 0
            and h >= 0
            and x >= -BOX_TOLERANCE
            and y >= -BOX_TOLERANCE
            and x + w <= width + BOX_TOLERANCE
            and y + h <= height + BOX_TOLERANCE
        )
    except (TypeError, ValueError):
        return False


def _explain_box(where: str, box: Any, size: tuple | None, problems: Problems) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        problems.add(
            f"{where} has bbox {box!r}; expected four finite numbers [x, y, width, "
            "height] in pixels. Correct or remove the annotation."
        )
    elif box[2] < 0 or box[3] < 0:
        problems.add(
            f"{where} has bbox {box!r} with a negative side; expected [x, y, width, "
            "height]. Order the corners before subtracting them."
        )
    else:
        hint = "Clip the box to the image"
        if size and box[2] <= size[0] + 2 and box[3] <= size[1] + 2:
            hint += ", or convert it if it holds corners [x1, y1, x2, y2]"
        problems.add(
            f"{where} has bbox {box!r}, which leaves its image of {size} (width, "
            f"height) by more than {BOX_TOLERANCE:g} px; expected [x, y, width, "
            f"height] in pixels. {hint}."
        )


def _segmentation_problem(segmentation: Any, size: tuple | None) -> str | None:
    """Say what is wrong with a polygon list or an RLE; None if nothing is."""
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, size)
    if not isinstance(segmentation, list):
        return (
            f"has a {kind_of(segmentation)} as segmentation; expected a list of "
            "polygons or an RLE. Export the masks again."
        )
    for number, polygon in enumerate(segmentation):
        if not isinstance(polygon, list):
            return (
                f"has segmentation {str(segmentation)[:60]}; expected a list of "
                "polygons, each a list [x0, y0, x1, y1, ...]. Wrap a single polygon in "
                "one more pair of brackets."
            )
        length = len(polygon)
        if length < 6 or length % 2:
            return (
                f"has {length} numbers in polygon {number}, {str(polygon)[:60]}; "
                "expected an even number and at least 6, for three corners. Remove the "
                "polygon, or write the box as four corners."
            )
        try:
            total = sum(polygon)
        except TypeError:
            total = None
        # A sum is not finite when one of its terms is not; it runs at C speed.
        if total is None or total - total != 0:
            return (
                f"has values in polygon {number} that are not finite numbers: "
                f"{str(polygon)[:60]}; expected pixels. Correct or remove the polygon."
            )
    return None


def _rle_problem(rle: dict[str, Any], size: tuple | None) -> str | None:
    missing = [key for key in ("size", "counts") if key not in rle]
    if missing:
        return (
            f"has an RLE without {' and '.join(missing)} (its keys are {sorted(rle)}); "
            "expected size [height, width] and counts. Encode the mask again."
        )
    shape, counts = rle["size"], rle["counts"]
    if size and shape != [size[1], size[0]]:
        return (
            f"has an RLE of size {shape!r}; expected [{size[1]}, {size[0]}], height "
            "and width of its image. Encode the mask at the size of the image."
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
