"""What the checks of data share: their errors, and how a list of problems is said."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmcastling.errors import UserError

SPELLED_OUT = 5  # problems of one file or folder; the rest is counted


class DatasetError(UserError, RuntimeError):
    """A dataset could not be fetched, read, built or written, or is malformed.

    The message names the offending value, what was expected and what to do about it;
    tools print it as it is, without a traceback.
    """


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
