"""The threshold of the auxiliary mask, in probability or in units of 1/N.

Uniform attention over ``N`` keys has probability ``1/N``, so one number does not fit
every resolution: the released 0.02 keeps the upper tail at 196 tokens and almost
nothing at 4,096. A threshold is therefore ``probability + multiple / N``, written as
a number (``0.02``) or as text (``'4/N'``, ``'0.01+2/N'``). The form is closed under
interpolation, which is what a decay schedule needs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mmcastling.errors import OptionError

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SPEC = re.compile(
    rf"\s*(?:(?P<alone>{_NUMBER})"
    rf"|(?:(?P<probability>{_NUMBER})\s*\+\s*)?(?P<multiple>{_NUMBER})\s*/\s*[nN])\s*"
)


@dataclass(frozen=True)
class MaskThreshold:
    """The smallest attention probability that survives the mask.

    Args:
        probability: The part that does not depend on the number of keys, in [0, 1].
        multiple: The part in units of uniform attention ``1/N``, not negative.

    Raises:
        ValueError: If a part is outside its range or not finite.
    """

    probability: float = 0.0
    multiple: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise OptionError(
                f"mask threshold {self.probability!r} is outside [0, 1]: it is a "
                "softmax probability (0.02 in the released code), or a multiple of "
                "uniform attention written as text, such as '4/N'"
            )
        if not (self.multiple >= 0.0 and math.isfinite(self.multiple)):
            raise OptionError(
                f"mask threshold of {self.multiple!r}/N is not a finite, non-negative "
                "multiple of uniform attention"
            )

    @classmethod
    def parse(cls, value: float | str | MaskThreshold) -> MaskThreshold:
        """Read a probability in [0, 1], or text such as ``'4/N'`` or ``'0.01+2/N'``.

        A threshold is returned as it is.

        Raises:
            ValueError: If the value cannot be read or is out of range.
        """
        if isinstance(value, MaskThreshold):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(float(value))
        match = _SPEC.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise OptionError(
                f"mask threshold {value!r} is not understood: give a probability such "
                "as 0.02, or a multiple of uniform attention such as '4/N'"
            )
        probability = match["alone"] or match["probability"] or 0.0
        return cls(float(probability), float(match["multiple"] or 0.0))

    @property
    def rejects_all(self) -> bool:
        """Whether no probability can exceed it, whatever the number of keys."""
        return self.probability >= 1.0

    def resolve(self, num_keys: int) -> float:
        """The probability that a pair must exceed among ``num_keys`` keys."""
        return min(1.0, self.probability + self.multiple / num_keys)

    def interpolate(self, other: MaskThreshold, fraction: float) -> MaskThreshold:
        """The threshold that lies ``fraction`` (0 to 1) of the way to ``other``."""
        if fraction >= 1.0:  # exactly, since 0.02 + (1 - 0.02) may round below 1
            return other
        return MaskThreshold(
            self.probability + (other.probability - self.probability) * fraction,
            self.multiple + (other.multiple - self.multiple) * fraction,
        )

    def __str__(self) -> str:
        """Text that :meth:`parse` reads as exactly this threshold."""
        if not self.multiple:
            return _text(self.probability)
        uniform = f"{_text(self.multiple)}/N"
        return f"{_text(self.probability)}+{uniform}" if self.probability else uniform


def _text(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
