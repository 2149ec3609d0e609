"""The parts of pages that scripts write, between two marks."""

import statistics
from collections.abc import Sequence


def replace_between(text: str, begin: str, end: str, body: str) -> str:
    """The text with another body between its two marks.

    Raises:
        ValueError: If the text does not have each of the marks once.
    """
    for mark in (begin, end):
        if text.count(mark) != 1:
            raise ValueError(f"the page has {mark.strip()!r} {text.count(mark)} times")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{body}{end}{rest.partition(end)[2]}"


def mean_and_each(values: Sequence[float], digits: int = 3) -> str:
    """The mean of some runs, and in brackets each."""
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ({each})"
