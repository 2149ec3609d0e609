"""One family of networks: how its weights find their place in our backbone."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmcastling.checkpoint import CheckpointError
from mmcastling.models.common import check_arch
from mmcastling.weights.dialect import Dialect, Names, first_match
from mmcastling.weights.source import Container

Options = dict[str, Any]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What the weights are wanted for.

    Args:
        arch: A name in the backbone's ``arch_zoo``, or its settings.
        img_size: Usual image size ``(H, W)``; None keeps the source's.
        in_channels: Channels of the image. Defaults to 3.
        attention: Options of the attention. Defaults to castling.
        noise: See :func:`mmcastling.weights.levit_heads.repeat_keys`. Defaults to 0.01.
        dist_token: Keep a distillation token. Defaults to False.
    """

    arch: str | dict[str, Any]
    img_size: tuple[int, int] | None = None
    in_channels: int = 3
    attention: Options = field(default_factory=lambda: {"type": "castling"})
    noise: float = 0.01
    dist_token: bool = False

    @property
    def is_softmax(self) -> bool:
        """Whether the backbone will be the published softmax network."""
        return self.attention == {"type": "softmax"}


class Family(ABC):
    """A backbone of ours and the names that its weights have elsewhere.

    Attributes:
        name: The family's name, for messages.
        command: The tool that imports it.
        backbone: Our class.
        needed: Keys of an architecture's settings.
        dialects: Names by library.
        patch: Our name of the weight that sees the image.
        stride: Pixels per token; None if that is the size of ``patch``.
        no_place: Reasons by pattern of our names for what a backbone has no place for.
        new: Patterns of our parameters that other libraries have not.
        resized: Pattern of the tables that a backbone resizes when it loads them.
    """

    name: str
    command: str
    backbone: type[nn.Module]
    needed: set[str]
    dialects: Sequence[Dialect]
    patch: str
    stride: int | None
    no_place: Names
    new: Sequence[str]
    resized: str

    @abstractmethod
    def facts(self, weights: Container) -> Facts:
        """Widths and depths that the weights show."""

    @abstractmethod
    def facts_of(self, arch: Mapping[str, Any]) -> Facts:
        """The same of an architecture's settings."""

    @abstractmethod
    def options(self, weights: Container, target: Target) -> Options:
        """Options of the backbone that the weights fit, without ``attention``."""

    @abstractmethod
    def adapt(
        self, weights: Container, target: Target, backbone: nn.Module
    ) -> tuple[Container, Names]:
        """Bring weights to the shapes of the backbone.

        Args:
            weights: Weights under our names.
            target: What they are for.
            backbone: What :meth:`build` returned.

        Returns:
            The weights, and what was done to those that were changed.
        """

    def check(self, weights: Container, target: Target) -> None:
        """Check that the weights are of the architecture that was named.

        Raises:
            ValueError: If there is no such architecture, or the image is too small.
            CheckpointError: If they are of another width, depth or number of channels.
        """
        zoo = self.backbone.arch_zoo
        arch = check_arch(target.arch, zoo, self.needed)
        patch = weights[self.patch]
        if patch.ndim != 4:
            raise CheckpointError(
                f"{self.patch} is {tuple(patch.shape)}, expected four dimensions "
                f"(out, in, height, width): the weights are of no {self.name} of images"
            )
        found, wanted = self.facts(weights), self.facts_of(arch)
        wrong = [name for name in found if found[name] != wanted[name]]
        if wrong:
            fitting = [
                name
                for name in zoo
                if found.items() <= self.facts_of(zoo[name]).items()
            ]
            raise CheckpointError(
                f"the weights are of another architecture than arch {target.arch!r}: "
                + "; ".join(
                    f"{name} {found[name]}, expected {wanted[name]}" for name in wrong
                )
                + (f". They fit arch {fitting[0]!r}" if fitting else "")
            )
        stride = self.stride or patch.shape[-1]
        if target.img_size is not None and min(target.img_size) < stride:
            raise ValueError(
                f"img_size {target.img_size} is smaller than a token of {stride}x"
                f"{stride} pixels"
            )
        channels = patch.shape[1]
        if channels != target.in_channels:
            raise CheckpointError(
                f"the weights are for images of {channels} channels, expected "
                f"{target.in_channels}: say --in-channels {channels}, or convert the "
                "first convolution"
            )

    def build(self, options: Options, target: Target) -> nn.Module:
        """Build the backbone on the ``meta`` device: no memory, no initialisation."""
        with torch.device("meta"):
            return self.backbone(**options, attention=target.attention)

    def fit(self, weights: Container, backbone: nn.Module) -> list[str]:
        """Give weights to the backbone; what it still lacks remains on ``meta``.

        Args:
            weights: Weights under our names, of our shapes.
            backbone: What :meth:`build` returned; changed in place.

        Returns:
            Names that are missing though other libraries have them.

        Raises:
            CheckpointError: If a shape differs, or something is quantised.
        """
        own = backbone.state_dict()
        misfits = [
            f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            for name, value in weights.items()
            if name in own
            and value.shape != own[name].shape
            and not re.fullmatch(self.resized, name)
        ]
        misfits += [
            f"{name} is of {value.dtype}, expected floating point"
            for name, value in weights.items()
            if name in own and own[name].is_floating_point() > value.is_floating_point()
        ]
        if misfits:
            raise CheckpointError(
                f"{len(misfits)} of the weights have another shape or type: "
                + "; ".join(misfits[:3])
            )
        held = {name: weights[name] for name in own if name in weights}
        try:
            backbone.load_state_dict(held, strict=False, assign=True)
        except RuntimeError as error:  # a table that its module cannot resize
            reason = " ".join(str(error).split())  # torch writes several lines
            raise CheckpointError(
                f"the weights do not fit: {reason}. Only tables of square images can "
                "be resized: for others give the source's own --img-size H W"
            ) from error
        known = dict.fromkeys([*self.new, r".*num_batches_tracked"], "")
        return [n for n in own if n not in held and first_match(known, n) is None]


def size_option(height: int, width: int) -> int | tuple[int, int]:
    """An image size as a backbone's option: one number for a square."""
    return height if height == width else (height, width)


def in_float32(weights: Container) -> Container:
    """Weights of half precision in single precision, counters as they are."""
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in weights.items()
    }


def count_blocks(weights: Container, pattern: str) -> int:
    """One more than the largest number that a pattern's first group matches."""
    found = [re.match(pattern, name) for name in weights]
    return max((int(match[1]) + 1 for match in found if match), default=0)
