"""Stored results by variant and seed, and what comparing them says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.study.statistics import Interval, interval, paired
from benchmarks.study.store import Run, Store

Values = dict[int, float]


class Results:
    """The results of some runs, as far as they are stored.

    Args:
        store: Where they are.
        runs: Which.
    """

    def __init__(self, store: Store, runs: Sequence[Run]) -> None:
        self.found: dict[str, dict[int, dict[str, Any]]] = {}
        self.missing: list[Run] = []
        self.total = len(runs)
        for run in runs:
            result = store.load(run)
            if result is None:
                self.missing.append(run)
            else:
                self.found.setdefault(run.name, {})[run.seed] = result

    def of(self, name: str, read: str | Callable[[dict[str, Any]], float]) -> Values:
        """A figure of each seed of a variant."""
        pick = (lambda result: result[read]) if isinstance(read, str) else read
        return {
            seed: pick(result)
            for seed, result in sorted(self.found.get(name, {}).items())
        }

    def any(self, name: str, key: str) -> Any:
        """What is the same for all seeds of a variant; None where nothing is stored."""
        for result in self.found.get(name, {}).values():
            return result[key]
        return None


def mean(values: Values) -> Interval | None:
    """Mean over seeds, None without one."""
    return interval(list(values.values())) if values else None


def cell(value: Interval | None, digits: int = 1, signed: bool = False) -> str:
    """An interval in a table."""
    return "not run" if value is None else value.text(digits, signed)


FEWEST = 3  # seeds that a verdict needs
VERDICTS = {1: "higher", -1: "lower", 0: "not told apart"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One variant against another over the seeds of both.

    Args:
        one: In words.
        other: In words.
        difference: ``one - other``, paired by seed.
    """

    one: str
    other: str
    difference: Interval | None

    @classmethod
    def of(cls, one: str, other: str, values: Values, others: Values) -> Comparison:
        """Compare values by seed."""
        return cls(one, other, paired(values, others))

    @property
    def verdict(self) -> str:
        """In one word."""
        if self.difference is None or self.difference.count < FEWEST:
            return "not measured"
        return VERDICTS[self.difference.verdict]

    def row(self, digits: int) -> str:
        """A row of a table."""
        count = 0 if self.difference is None else self.difference.count
        return (
            f"| {self.one} - {self.other} | {cell(self.difference, digits, True)} "
            f"| {count} | {self.verdict} |"
        )


def comparison_table(comparisons: Iterable[Comparison], unit: str, digits: int) -> str:
    """Paired differences in Markdown."""
    lines = [
        f"| difference, {unit} | mean and 95% interval | seeds | the first is |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(c.row(digits) for c in comparisons)]) + "\n"


def sentence(subject: str, comparisons: Sequence[Comparison]) -> str:
    """All verdicts on one variant in a sentence."""
    parts = []
    for verdict, words in (
        ("higher", "is above"),
        ("lower", "is below"),
        ("not told apart", "cannot be told apart from"),
        ("not measured", "was not measured against"),
    ):
        names = [c.other for c in comparisons if c.verdict == verdict]
        if names:
            parts.append(f"{words} {listed(names)}")
    return f"{subject} {'; it '.join(parts)}."


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
