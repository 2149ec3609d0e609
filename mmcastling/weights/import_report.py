"""What an import did with every parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
        changed: What was done to some parameters, by name.
        new: Elements of those that the backbone initialises, unless in ``changed``.
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

    def __str__(self) -> str:
        options = dict(self.backbone)
        name = options.pop("type").rpartition(".")[2]
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        inside = f" under {self.where!r}" if self.where else ""
        share = self.loaded_share
        whose = f"{self.source}{inside}, with the names of {self.names}"
        lines = [f"{whose}, for {name}({given})"]
        for title, names, part in (
            ("loaded", self.loaded, f"{share:7.2%} of the backbone"),
            ("initialised anew", self.new, f"{1 - share:7.2%} of the backbone"),
            ("dropped", self.dropped, f"{self.dropped_share:7.2%} of the file"),
        ):
            lines.append(f"{title:17} {len(names):4d} tensors {part}")
            plain = [n for n in self.new if n not in self.changed and names is self.new]
            lines += [f"    {text}" for text in collapse(plain)]
            reasons = self.dropped if names is self.dropped else self.changed
            lines += _by_reason({n: reasons[n] for n in names if n in reasons})
        if self.unexpected:
            lines.append("unexpected, let pass by --allow-partial:")
            lines += [f"    {text}" for text in self.unexpected]
        return "\n".join(lines)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    groups = defaultdict(list)
    for name, reason in reasons.items():
        groups[reason].append(name)
    return [f"    {why}: {', '.join(collapse(names))}" for why, names in groups.items()]


def collapse(names: Iterable[str]) -> list[str]:
    """Write names that differ in numbers only once: ``layers.*.ln1.weight (12)``."""
    groups = defaultdict(list)
    for name in names:
        parts = name.split(".")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        groups[pattern].append(parts)
    texts = []
    for members in groups.values():
        places = [set(place) for place in zip(*members, strict=True)]
        text = ".".join("*" if len(place) > 1 else min(place) for place in places)
        texts.append(f"{text} ({len(members)})" if len(members) > 1 else text)
    return texts
