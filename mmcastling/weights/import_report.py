"""What an import did with every parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ImportReport:
    """What was loaded, what the backbone initialises itself, what was dropped.

    Attributes:
        source: Name of the file.
        names: Whose names its parameters have.
        where: Path and prefix of the network inside the file.
        backbone: Options that build the backbone that the weights fit.
        loaded: Elements by name of our parameters and statistics that came from it.
        changed: What was done to some parameters, by name; others are as in the file.
        new: Elements by name of our parameters that the source has not; the backbone
            initialises them, if ``changed`` does not say otherwise.
        dropped: Reasons by the source's names.
        unexpected: What was overlooked for ``--allow-partial``.
        dropped_share: Share of the file's elements that was dropped.
    """

    source: str
    names: str
    where: str
    backbone: dict[str, Any]
    loaded: dict[str, int] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    new: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    dropped_share: float = 0.0

    @property
    def loaded_share(self) -> float:
        """Share of the backbone's elements that came from the file."""
        loaded, new = sum(self.loaded.values()), sum(self.new.values())
        return loaded / max(1, loaded + new)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's ``meta``."""
        return {**asdict(self), "loaded_share": self.loaded_share}

    def _changes_of(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self.changed[name] for name in names if name in self.changed}

    def __str__(self) -> str:
        options = dict(self.backbone)
        name = options.pop("type").rpartition(".")[2]
        inside = f" under {self.where!r}" if self.where else ""
        lines = [
            f"{self.source}{inside}, with the names of {self.names}, for "
            f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})",
            f"loaded            {_count(self.loaded)} {self.loaded_share:7.2%} of the "
            "backbone",
        ]
        lines += _by_reason(self._changes_of(self.loaded))
        lines.append(
            f"initialised anew  {_count(self.new)} {1 - self.loaded_share:7.2%} of the "
            "backbone"
        )
        plain = [name for name in self.new if name not in self.changed]
        lines += [f"    {text}" for text in collapse(plain)]
        lines += _by_reason(self._changes_of(self.new))
        lines.append(
            f"dropped           {_count(self.dropped)} {self.dropped_share:7.2%} of "
            "the file"
        )
        lines += _by_reason(self.dropped)
        if self.unexpected:
            lines.append("unexpected, let pass by --allow-partial:")
            lines += [f"    {text}" for text in self.unexpected]
        return "\n".join(lines)


def _count(names: Iterable[str]) -> str:
    return f"{len(list(names)):4d} tensors"


def _by_reason(reasons: dict[str, str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return [
        f"    {reason}: {', '.join(collapse(names))}"
        for reason, names in groups.items()
    ]


def collapse(names: Iterable[str]) -> list[str]:
    """Write names that differ in numbers only once: ``layers.*.ln1.weight (12)``."""
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        groups.setdefault(pattern, []).append(parts)
    texts = []
    for members in groups.values():
        places = [set(place) for place in zip(*members, strict=True)]
        text = ".".join("*" if len(place) > 1 else min(place) for place in places)
        texts.append(f"{text} ({len(members)})" if len(members) > 1 else text)
    return texts
