"""What the checks of data share: errors, how problems are said, kinds of values."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmcastling.errors import UserError

SPELLED_OUT = 5  # problems of one file or folder; the rest is counted


class DatasetError(UserError, RuntimeError):
    """A dataset could not be fetched, read, built or written, or is malformed."""


class CocoFormatError(DatasetError):
    """An annotation file is not usable; the message lists the first problems."""


class SegmentationFormatError(DatasetError):
    """A split is not usable; the message lists the first problems."""


def raise_if_any(problems: list[str], path: Path, error: type[DatasetError]) -> None:
    """Raise one error that lists what is wrong with ``path``, if anything is."""
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems[:SPELLED_OUT])
        rest = len(problems) - SPELLED_OUT
        more = f"\n  ... and {rest} more" if rest > 0 else ""
        noun = "problem" if len(problems) == 1 else "problems"
        raise error(f"{path} has {len(problems)} {noun}:{lines}{more}")


def some_of(values: Iterable[Any], limit: int = 5) -> str:
    """Name the first few values, and say how many more there are."""
    values = list(values)
    shown = ", ".join(map(repr, values[:limit])) or "nothing"
    return shown + (f" and {len(values) - limit} more" if values[limit:] else "")


def has_keys(entry: Any, keys: Sequence[str], where: str, problems: list[str]) -> bool:
    """Whether an entry is an object with these keys; notes what is missing."""
    if not isinstance(entry, dict):
        problems.append(
            f"{where} is a {kind_of(entry)}; expected an object. Remove it."
        )
        return False
    missing = [key for key in keys if key not in entry]
    if missing:
        hint = "Export the file in COCO's instance format"
        if missing == ["iscrowd"]:
            hint = "Write 0; the evaluation fails without it"
        problems.append(
            f"{where} (id {entry.get('id')!r}) has no {', '.join(missing)}; expected "
            f"the keys {', '.join(keys)}. {hint}."
        )
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
