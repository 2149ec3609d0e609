"""What castling a model has done to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Castled:
    """One attention that was swapped.

    Args:
        name: Its name in the model.
        was: Name of its class before.
        stage: Index of the stage it belongs to, as ``castle(stages=...)`` counts.
        notes: What else its adapter has to say.
    """

    name: str
    was: str
    stage: int
    notes: tuple[str, ...] = ()


@dataclass
class CastleReport:
    """What was castled, what was left alone, and what became of the weights.

    Args:
        type: The attention that took the others' place.
        castled: The attentions that were swapped.
        left_alone: The reason for each attention that was not, by name.
        dropped: Names of weights and buffers that the model no longer has.
        new: Names of weights and buffers that it did not have before.
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
        groups: dict[tuple[str, str], list[str]] = {}
        for kind, name, what in said:
            groups.setdefault((kind, what), []).append(name)
        rows = [
            (kind, name, what)
            for (kind, what), names in groups.items()
            for name in _together(names)
        ]
        width = max(len(name) for _, name, _ in rows)
        lines = [f"{kind:<10}  {name:<{width}}  {what}" for kind, name, what in rows]
        return "\n".join(line.rstrip() for line in lines)


def _together(names: Iterable[str]) -> list[str]:
    """``['layers.*.attn (x12)']`` for names that differ in their numbers only."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [
        same[0] if len(same) == 1 else f"{pattern} (x{len(same)})"
        for pattern, same in groups.items()
    ]
