"""What castling a model has done to it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Castled:
    """One attention that was swapped."""

    name: str  # in the model
    was: str  # its class
    stage: int  # as castle(stages=...) counts
    notes: tuple[str, ...] = ()  # of its adapter


@dataclass
class CastleReport:
    """What was castled, what was left alone, and what became of the weights.

    Args:
        type: The attention that took the others' place.
        castled: The attentions that were swapped.
        left_alone: The reason for each attention that was not, by name.
        dropped: Names of weights and buffers that are gone.
        new: Names of those that were not there before.
        num_kept: Number of weights and buffers that are the same tensors as before.
    """

    type: str
    castled: list[Castled] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    num_kept: int = 0

    @property
    def notes(self) -> dict[str, list[str]]:
        """Names of the attentions that each note is about."""
        notes: dict[str, list[str]] = {}
        for item in self.castled:
            for note in item.notes:
                notes.setdefault(note, []).append(item.name)
        return notes

    @property
    def lossy(self) -> bool:
        """Whether something of the original model is no longer in effect."""
        return bool(self.dropped or self.notes)

    def __str__(self) -> str:
        """A line per kind of thing; names that differ in numbers only share one."""
        said = [("castled", i.name, f"{i.was} -> {self.type}") for i in self.castled]
        said += [("left alone", name, why) for name, why in self.left_alone.items()]
        said += [("dropped", name, "") for name in self.dropped]
        said += [("new", name, "") for name in self.new]
        said += [("note", n, note) for note, names in self.notes.items() for n in names]
        said.append(("kept", f"{self.num_kept} weights and buffers", ""))
        groups: dict[tuple[str, str, str], list[str]] = {}
        for kind, name, what in said:
            pattern = re.sub(r"\d+", "*", name)
            groups.setdefault((kind, what, pattern), []).append(name)
        rows = [
            (kind, names[0] if len(names) == 1 else f"{pattern} (x{len(names)})", what)
            for (kind, what, pattern), names in groups.items()
        ]
        width = max(len(name) for _, name, _ in rows)
        lines = [f"{kind:<10}  {name:<{width}}  {what}" for kind, name, what in rows]
        return "\n".join(line.rstrip() for line in lines)
