"""Names that libraries give to the parameters of one family of networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mmcastling.checkpoint import CheckpointError
from mmcastling.weights.source import Container

PREFERRED = ("state_dict", "model", "model_state", "", "teacher")
"""Which dictionary of a file is meant where several hold the same network."""

Names = dict[str, str]


@dataclass(frozen=True)
class Dialect:
    """How one group of libraries names the parameters of a family.

    Args:
        name: The libraries, for messages.
        anchor: A name that every such checkpoint has; what stands before it in the file
            is the prefix of the whole network.
        mark: Pattern of a name that tells the dialect from others with that anchor.
        renames: Replacements by pattern of a whole name; a name of which no pattern is
            known is not understood.
        unless: Pattern of a name that such a checkpoint never has. Defaults to ``''``.
        drops: Reasons by pattern for what has no place in a backbone.
        regroup: First renames that depend on all names together: gives the new ones of
            those that change.
    """

    name: str
    anchor: str
    mark: str
    renames: Names
    unless: str = ""
    drops: Names = field(default_factory=dict)
    regroup: Callable[[Iterable[str]], Names] = lambda names: {}

    def prefixes(self, weights: Container) -> list[str]:
        """What stands before the network's names, once per copy of the network."""
        ends = [n.removesuffix(self.anchor) for n in weights if n.endswith(self.anchor)]
        return [
            prefix
            for prefix in ends
            if (not prefix or prefix.endswith("."))
            and self._has(weights, prefix, self.mark)
            and not (self.unless and self._has(weights, prefix, self.unless))
        ]

    @staticmethod
    def _has(weights: Container, prefix: str, pattern: str) -> bool:
        compiled = re.compile(re.escape(prefix) + pattern)
        return any(compiled.fullmatch(name) for name in weights)

    def translate(self, weights: Container) -> Translation:
        """Rename the parameters of a network, its prefix removed."""
        result = Translation({}, {}, {}, [])
        regrouped = self.regroup(weights)
        for source, value in weights.items():
            name = regrouped.get(source, source)
            if (reason := first_match(self.drops, name)) is not None:
                result.dropped[source] = reason
                continue
            for pattern, replacement in self.renames.items():
                if match := re.fullmatch(pattern, name):
                    ours = match.expand(replacement)
                    result.weights[ours] = value
                    result.sources[ours] = source
                    break
            else:
                result.unknown.append(source)
        return result


@dataclass
class Translation:
    """A network's parameters under our names.

    Attributes:
        weights: Those that were renamed.
        sources: The names that they had.
        dropped: Reasons by the source's names.
        unknown: Names that the dialect does not have.
    """

    weights: Container
    sources: Names
    dropped: Names
    unknown: list[str]


@dataclass(frozen=True)
class Found:
    """A network in a file.

    Attributes:
        dialect: How its parameters are named.
        where: Path and prefix of its names.
        weights: Its parameters, the prefix removed.
        outside: What else is in the same dictionary, with whole names.
    """

    dialect: Dialect
    where: str
    weights: Container
    outside: Container


def locate(
    containers: dict[str, Container],
    dialects: Sequence[Dialect],
    prefix: str | None = None,
) -> Found | None:
    """Find the network in a file.

    Args:
        containers: What :func:`~mmcastling.weights.source.read_source` returned.
        dialects: The names it may have.
        prefix: Path and prefix of the one that is meant, where there are several.
            Defaults to None.

    Returns:
        The network, or None if there is none.

    Raises:
        CheckpointError: If there are several, or none has the prefix asked for.
    """
    options: dict[str, tuple[str, str, Dialect]] = {}
    for path, weights in containers.items():
        for dialect in dialects:
            for inner in dialect.prefixes(weights):
                where = f"{path}.{inner}" if path else inner
                options.setdefault(where, (path, inner, dialect))
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        if wanted not in options:
            raise CheckpointError(
                f"no network has the prefix {prefix!r}; "
                + (f"choose one of {sorted(options)}" if options else "there is none")
            )
        options = {wanted: options[wanted]}
    if not options:
        return None
    if len(options) > 1:
        paths = {path for path, _, _ in options.values()}
        best = next((path for path in PREFERRED if path in paths), None)
        left = {k: v for k, v in options.items() if v[0] == best}
        if len(left) != 1:
            raise CheckpointError(
                f"the file holds several networks: choose one of {sorted(options)} "
                "with --prefix"
            )
        options = left
    ((where, (path, inner, dialect)),) = options.items()
    held = containers[path]
    weights = {
        name.removeprefix(inner): value
        for name, value in held.items()
        if name.startswith(inner)
    }
    outside = {n: v for n, v in held.items() if not n.startswith(inner)}
    return Found(dialect, where, weights, outside)


def first_match(patterns: Names, name: str) -> str | None:
    """The value of the first pattern that matches the whole name."""
    for pattern, value in patterns.items():
        if re.fullmatch(pattern, name):
            return value
    return None
