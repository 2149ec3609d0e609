"""What adapters are made of: the builder of mixers and a castled attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention import TokenMixer, build_mixer
from mmcastling.attention.fast import fuse_linear
from mmcastling.attention.local_conv import merge_heads

Grid = tuple[int, int]


@dataclass(frozen=True)
class GridFinder:
    """Finds the grid of tokens for attentions that are called without it.

    Args:
        grid: ``(H, W)``, if it was given.
        extra_tokens: Tokens before those of the grid (class and register tokens).
    """

    grid: Grid | None = None
    extra_tokens: int = 0

    def __call__(self, num_tokens: int) -> Grid | None:
        """The grid given, or the square one, or None if there is no square one.

        Raises:
            ValueError: If the grid given does not fit the number of tokens.
        """
        patches = num_tokens - self.extra_tokens
        if self.grid is not None:
            if math.prod(self.grid) != patches:
                raise ValueError(
                    f"castle was given grid={self.grid}, but there are {num_tokens} "
                    f"tokens, {self.extra_tokens} of them not on the grid"
                )
            return self.grid
        side = math.isqrt(max(patches, 0))
        return (side, side) if side * side == patches else None


class MixerBuilder:
    """Builds the mixers of one attention, on its device and in its precision.

    Args:
        options: Options of :func:`mmcastling.attention.build_mixer`, with ``type``.
        deploy: Build the pruned form.
        find_grid: The grid of the attention's tokens.
        attention: The attention that will be replaced.

    Attributes:
        find_grid: As above.
        notes: What the report should say about this attention.
    """

    def __init__(
        self,
        options: dict[str, Any],
        deploy: bool,
        find_grid: GridFinder,
        attention: nn.Module,
    ) -> None:
        self._options = options
        self._deploy = deploy
        self._attention = attention
        self.find_grid = find_grid
        self.notes: list[str] = []

    def __call__(
        self, num_heads: int, head_dims: int, key_dims: int | None = None
    ) -> TokenMixer:
        """Build a mixer.

        Args:
            num_heads: Number of heads.
            head_dims: Channels per head of the values.
            key_dims: Those of queries and keys. Defaults to None (``head_dims``).

        Raises:
            ValueError: If an option is not known or has a bad value.
        """
        mixer = build_mixer(
            self._options,
            deploy=self._deploy,
            num_heads=num_heads,
            head_dims=head_dims,
            key_dims=key_dims,
        )
        for weight in self._attention.parameters():
            if weight.is_floating_point():
                mixer.to(device=weight.device, dtype=weight.dtype)
                break
        return mixer.train(self._attention.training)

    def note(self, text: str) -> None:
        """Say something in the report."""
        self.notes.append(text)

    def note_dropout(self, probability: float | nn.Dropout) -> None:
        """Say that a dropout on attention probabilities is gone, if there was one."""
        probability = getattr(probability, "p", probability)
        if probability:
            self.note(f"attention dropout of {probability:g} is not applied")


class CastledAttention(nn.Module):
    """Project tokens, mix them, project back, with the layers of another attention.

    Enough by itself for attentions that are called as ``attention(x)`` and whose
    ``qkv`` layer yields ``(3, h, d)`` channels; others override :meth:`project` or
    :meth:`forward`.

    Args:
        build: What the adapter was given.
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values.
        key_dims: Those of queries and keys. Defaults to None (``head_dims``).
        scale: Factor of the logits, which only a softmax depends on. Defaults to None
            (``d ** -0.5``).
        **layers: The layers to keep, under the names they shall have; ``qkv`` and
            ``proj`` are those that this class itself uses.
    """

    def __init__(
        self,
        build: MixerBuilder,
        num_heads: int,
        head_dims: int,
        key_dims: int | None = None,
        scale: float | None = None,
        **layers: nn.Module | nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dims = head_dims
        self.key_dims = key_dims or head_dims
        # The mixer divides by sqrt(d) itself.
        factor = 1.0 if scale is None else scale * math.sqrt(self.key_dims)
        self.query_factor = None if math.isclose(factor, 1.0) else factor
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.mixer = build(num_heads, head_dims, key_dims)
        self.find_grid = build.find_grid

    def switch_to_deploy(self) -> None:
        """Let the projections become fused layers; outputs are the same, rounded."""
        for layer in self.children():
            fuse_linear(layer)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``(B, N, 3 * h * d)`` into three of ``(B, h, N, d)``."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dims))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens ``(B, N, C)`` to q, k and v, each ``(B, h, N, d)``."""
        return self.split(self.qkv(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None = None) -> Tensor:
        """Mix values ``(B, h, N, e)`` over tokens, on the grid given or found."""
        if self.query_factor is not None:
            q = q * self.query_factor
        return self.mixer(q, k, v, grid or self.find_grid(v.shape[2]))

    def attend(self, x: Tensor) -> Tensor:
        """Project and mix tokens: ``(B, N, C)`` to ``(B, N, h * e)``."""
        return merge_heads(self.mix(*self.project(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Attend, tokens ``(B, N, C)`` to the same."""
        return self.proj(self.attend(x))


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer that holds these very parameters."""
    layer = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"
    )
    layer.weight, layer.bias = weight, bias
    return layer


def extra_tokens_of(ancestors: Sequence[nn.Module]) -> int:
    """How many tokens lead the grid, as the nearest module that knows says.

    Args:
        ancestors: The modules that hold an attention, the nearest first.
    """
    for module in ancestors:
        for name in ("num_extra_tokens", "num_prefix_tokens"):  # mmpretrain's, timm's
            count = getattr(module, name, None)
            if isinstance(count, int):
                return count
        if isinstance(getattr(module, "class_token", None), torch.Tensor):
            return 1  # torchvision's
    return 0
