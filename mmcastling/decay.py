"""How the auxiliary masks go to zero: a pure function of training progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from mmcastling.attention import MaskThreshold
from mmcastling.errors import OptionError

# The smaller end of an exponential curve is this fraction of its larger end: about 1/N
# at the 1,024 tokens of a small dense task.
_RANGE = math.exp(-7.0)


def _exp_growth(t: float) -> float:
    return (_RANGE ** (1.0 - t) - _RANGE) / (1.0 - _RANGE)


CURVES: dict[str, Callable[[float, bool], float]] = {
    "linear": lambda t, rising: t,
    "cosine": lambda t, rising: (1.0 - math.cos(math.pi * t)) / 2.0,
    # Exponential in the value itself: slow near its small end, fast near its large one.
    "exp": lambda t, rising: _exp_growth(t) if rising else 1.0 - _exp_growth(1.0 - t),
}
MODES = ("threshold", "weight", "none")


@dataclass(frozen=True)
class MaskDecay:
    """The course of the masks while a castled model trains.

    Args:
        mode: ``'threshold'`` raises the threshold from ``start`` to ``end``;
            ``'weight'`` fades the branch's weight from 1 to 0 at threshold ``start``;
            ``'none'`` keeps ``start``, as the released code does. Defaults to
            ``'threshold'``.
        start: Threshold at first, a probability or a multiple of uniform attention
            such as ``'4/N'``. Defaults to 0.02, the released value.
        end: Threshold at last, in mode ``'threshold'``; at 1 the branch is off.
            Defaults to 1.
        begin: Fraction of training at which the decay begins. Defaults to 0.
        finish: Fraction of training at which it ends. Defaults to 0.7, which leaves the
            last part to training exactly what will be deployed.
        curve: ``'linear'``, ``'cosine'`` or ``'exp'`` (the value itself grows or falls
            exponentially). Defaults to ``'exp'``.

    Raises:
        ValueError: If an option is out of range.
    """

    mode: str = "threshold"
    start: float | str | MaskThreshold = 0.02
    end: float | str | MaskThreshold = 1.0
    begin: float = 0.0
    finish: float = 0.7
    curve: str = "exp"

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("curve", tuple(CURVES))):
            if (value := getattr(self, name)) not in known:
                raise OptionError(
                    f"{name} {value!r} is not known: choose one of {known}"
                )
        for name in ("begin", "finish"):
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise OptionError(
                    f"{name}={value!r} is not a fraction of training: give a number "
                    "from 0 to 1"
                )
        if self.begin > self.finish:
            raise OptionError(
                f"begin={self.begin!r} is after finish={self.finish!r}: the decay must "
                "begin before it finishes"
            )
        for name in ("start", "end"):  # the class is frozen
            object.__setattr__(self, name, MaskThreshold.parse(getattr(self, name)))

    def state_at(self, progress: float) -> tuple[MaskThreshold, float]:
        """Threshold and weight at a fraction of training."""
        if progress >= self.finish:
            t = 1.0
        elif progress <= self.begin:
            t = 0.0
        else:
            t = (progress - self.begin) / (self.finish - self.begin)
        curve = CURVES[self.curve]
        if self.mode == "threshold":
            return self.start.interpolate(self.end, curve(t, True)), 1.0
        if self.mode == "weight":
            return self.start, 1.0 - curve(t, False) if t < 1.0 else 0.0
        return self.start, 1.0
