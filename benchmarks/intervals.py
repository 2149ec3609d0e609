"""Means over seeds, paired differences, and their 95% intervals."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its interval by Student's t.

    Args:
        mean: Over seeds.
        half: Half the width of the interval; infinite with one seed.
        count: How many seeds.
    """

    mean: float
    half: float
    count: int

    def text(self, digits: int = 1, signed: bool = False) -> str:
        """``mean ± half``."""
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return f"{mean} ± {self.half:.{digits}f}" if self.count > 1 else mean


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of independent values."""
    count = len(values)
    mean = statistics.fmean(values)
    if count < 2:
        return Interval(mean, math.inf, count)
    t = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    half = float(t) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """The interval of ``one - other`` over the seeds that both have, None without."""
    shared = sorted(one.keys() & other.keys())
    return interval([one[seed] - other[seed] for seed in shared]) if shared else None
