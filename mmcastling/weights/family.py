"""What importers know of a family of networks, and of the libraries that have it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmcastling.errors import CheckpointError
from mmcastling.models.common import check_arch
from mmcastling.weights.source import Weights

Rules = Mapping[str, str | Callable[[re.Match[str]], str]]
"""Patterns and replacements of :func:`re.sub`, applied in this order."""


@dataclass(frozen=True)
class Library:
    """How one library, or several alike, name the parameters of a family."""

    name: str
    # A name that every such network has; what stands before it in a file is the prefix
    # of the whole network. The mark is the pattern of another, which tells the network
    # from others.
    anchor: str
    mark: str
    # Turn its names into ours; a function gives them for all names together.
    rules: Rules | Callable[[Iterable[str]], Rules] = field(default_factory=dict)

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """What stands before a network's names, once per copy of the network."""
        ends = [n.removesuffix(self.anchor) for n in names if n.endswith(self.anchor)]
        return [
            prefix
            for prefix in ends
            if prefix[-1:] in ("", ".")
            and any(re.fullmatch(re.escape(prefix) + self.mark, n) for n in names)
        ]

    def rename(self, names: Iterable[str]) -> dict[str, str]:
        """Our names by the library's; what no rule knows stays as it is."""
        rules = self.rules(names) if callable(self.rules) else self.rules
        ours = {name: name for name in names}
        for pattern, replacement in rules.items():
            ours = {n: re.sub(pattern, replacement, new) for n, new in ours.items()}
        return ours


@dataclass(frozen=True)
class Target:
    """What weights are wanted for: arguments of ``import_checkpoint``."""

    arch: str | dict[str, Any]
    img_size: tuple[int, int] | None
    in_channels: int
    attention: dict[str, Any]
    noise: float
    dist_token: bool

    @property
    def is_softmax(self) -> bool:
        """Whether the backbone will be the published softmax network."""
        return self.attention == {"type": "softmax"}


@dataclass(frozen=True)
class Family:
    """A backbone of ours, and how weights under our names come into it."""

    name: str
    backbone: type[nn.Module]
    libraries: tuple[Library, ...]
    patch: str  # the weight that sees the image
    stride: int | None  # pixels per token; None if that is the size of `patch`
    dropped: Mapping[str, str]  # reasons by pattern for what may have no place
    new: str  # pattern of the parameters that no library has
    # Settings of the architecture that weights show, and further ones that they fit.
    sizes: Callable[[Weights], dict[str, Any]]
    options: Callable[[Weights, Target], dict[str, Any]]
    # Brings weights to the backbone's shapes, in place, and says by name what it did;
    # what the backbone does itself when it loads is left to it.
    reshape: Callable[[Weights, Target, nn.Module], dict[str, str]]

    def check(self, weights: Weights, target: Target) -> None:
        """Raise unless width, depth, channels and token fit the architecture named."""
        zoo = self.backbone.arch_zoo
        arch = check_arch(target.arch, zoo, set(next(iter(zoo.values()))))
        patch = weights[self.patch]
        if patch.ndim != 4:
            raise CheckpointError(
                f"{self.patch} is {tuple(patch.shape)}, expected four dimensions "
                f"(out, in, height, width): the weights are of no {self.name} of images"
            )
        found = self.sizes(weights)
        wrong = [
            f"{name} {value}, expected {arch[name]}"
            for name, value in found.items()
            if value != (list(arch[name]) if isinstance(value, list) else arch[name])
        ]
        if wrong:
            fitting = [name for name in zoo if found.items() <= zoo[name].items()]
            raise CheckpointError(
                f"the weights are of another architecture than arch {target.arch!r}: "
                + "; ".join(wrong)
                + (f". They fit arch {fitting[0]!r}" if fitting else "")
            )
        stride = self.stride or patch.shape[-1]
        if target.img_size is not None and min(target.img_size) < stride:
            raise CheckpointError(
                f"img_size {target.img_size} is smaller than a token of {stride}x"
                f"{stride} pixels"
            )
        if (channels := patch.shape[1]) != target.in_channels:
            raise CheckpointError(
                f"the weights are for images of {channels} channels, expected "
                f"{target.in_channels}: say --in-channels {channels}, or convert the "
                "first convolution"
            )


def size_of(weights: Weights, name: str, dim: int = 0) -> int | None:
    """The length of a weight, None if it is missing."""
    return weights[name].shape[dim] if name in weights else None


def count_blocks(names: Iterable[str], stem: str) -> int:
    """One more than the largest number behind ``stem``, such as ``'layers.'``."""
    numbers = (re.match(rf"{re.escape(stem)}(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)
