"""What adapters are made of: the builder of mixers and a castled attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention import TokenMixer, build_mixer
from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads, split_qkv
from mmcastling.attention.mixer import Bias
from mmcastling.attention.opaque import OpaqueModule
from mmcastling.attention.peers.softmax import SoftmaxMixer
from mmcastling.castle.adapter_registry import CannotCastle
from mmcastling.castle.grid import GridSource
from mmcastling.errors import OptionError

RECOMMENDED: dict[str, Any] = dict(
    form="landmarks",
    local_conv=dict(type="grid", init="zero"),
    mask_threshold="4/N",
)
"""What ``castle`` gives an attention that says nothing else: the form that keeps most
of trained weights, as measured in docs/align.md."""

WITHOUT_GRID: dict[str, Any] = dict(form="learned", center_keys=True)
"""The form that it gives one whose tokens are on no grid, or on one that is not known.
"""

_NEEDS_NO_GRID = "use form='learned' and local_conv='token', which need none"


def recommended_options(
    given: Mapping[str, Any], no_grid: bool = False
) -> dict[str, Any]:
    """Options of a mixer: those given, and for the rest :data:`RECOMMENDED`.

    Of a form other than the recommended one keys are centred, too.

    Args:
        given: Those given, with ``type``.
        no_grid: Whether the grid of the tokens is not known. Defaults to False.
    """
    kind, rest = given.get("type", "castling"), dict(RECOMMENDED)
    if kind not in ("castling", "linear_angular"):
        return dict(given)
    if kind == "linear_angular":  # without the branch that a threshold would mask
        del rest["mask_threshold"]
    if no_grid:
        rest["local_conv"] = dict(rest["local_conv"], type="token")
    if no_grid or given.get("form", rest["form"]) != rest["form"]:
        rest.update(WITHOUT_GRID)
    return {**rest, **given}


@dataclass
class MixerBuilder:
    """Builds the mixers of one attention, on its device and in its precision.

    Args:
        attention: The attention that will be replaced.
        options: Those of the mixer that were given, with ``type``.
        deploy: Whether to build deployed forms.
        grid: ``(H, W)`` of the attention's tokens, if it was given.
        grid_source: What knows it of each image that passes, if something does.
        maps: The layers that it listens to.
        token_size: Rows and columns of a map's tokens that are one of the attention's.
        extra_tokens: Tokens before those of the grid (class and register tokens).
        holders: The modules that hold the attention, the nearest first.
        notes: What the report should say about this attention.
        shared: What :meth:`drop_shared` was told.
        off_grid: Why the tokens are not in the order of a grid, set by an adapter whose
            are not. What was not asked for then is what needs no grid, as it is where
            nothing knows the grid.
    """

    attention: nn.Module
    options: dict[str, Any]
    deploy: bool
    grid: Grid | None = None
    grid_source: GridSource | None = None
    maps: Sequence[nn.Module] = ()
    token_size: Grid = (1, 1)
    extra_tokens: int = 0
    holders: Sequence[nn.Module] = ()
    notes: list[str] = field(default_factory=list)
    shared: list[tuple[nn.Module, str]] = field(default_factory=list)
    off_grid: str = ""

    def __call__(
        self, num_heads: int, head_dims: int, key_dims: int | None = None
    ) -> TokenMixer:
        """Build a mixer; arguments as of :func:`mmcastling.attention.build_mixer`.

        Raises:
            ValueError: If an option is not known or has a bad value.
            CannotCastle: If the tokens are not on the grid that it asks for.
        """
        no_grid = self.grid is None and self.grid_source is None
        options = recommended_options(self.options, no_grid or bool(self.off_grid))
        mixer = build_mixer(
            options, num_heads, head_dims, key_dims=key_dims, deploy=self.deploy
        )
        if self.off_grid and mixer.uses_grid:
            raise CannotCastle(f"{self.off_grid}: {_NEEDS_NO_GRID}")
        for weight in filter(Tensor.is_floating_point, self.attention.parameters()):
            mixer.to(weight)
            break
        return mixer.train(self.attention.training)

    def listen_to(self, layer: nn.Module) -> None:
        """Learn the grid from a layer: of the output of ``nn.Conv2d``, or the input.

        That of others is a map ``(B, H, W, C)``.
        """
        self.grid_source, self.maps = GridSource(), [layer]

    def note(self, text: str) -> None:
        """Say something in the report."""
        self.notes.append(text)

    def is_inside(self, kind: str) -> bool:
        """Whether a module whose class is called so holds the attention."""
        return any(type(holder).__name__ == kind for holder in self.holders)

    def drop_shared(self, name: str) -> None:
        """Say that a module which a holder shares among its attentions is not applied.

        It becomes None, which a holder must allow, once every one of them is castled.
        """
        for holder in self.holders:
            if isinstance(getattr(holder, name, None), nn.Module):
                self.note("a relative position bias shared by blocks is not applied")
                self.shared.append((holder, name))

    def note_dropout(self, probability: float | nn.Dropout) -> None:
        """Say that a dropout on attention probabilities is gone, if there was one."""
        probability = getattr(probability, "p", probability)
        if probability:
            self.note(f"attention dropout of {probability:g} is not applied")


class CastledAttention(OpaqueModule):
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
        keep: Names of layers, parameters and settings to take over from the old
            attention; those that it does not have become None. Defaults to none.
        bias: Likewise, of those that serve a bias of the logits alone. They stay for as
            long as the mixer has a place for it: in a castling one, until deployed.
            Defaults to none.
        **layers: Further ones, under the names they shall have; ``qkv`` and ``proj``
            are those that this class itself uses.
    """

    def __init__(
        self,
        build: MixerBuilder,
        num_heads: int,
        head_dims: int,
        key_dims: int | None = None,
        scale: float | None = None,
        keep: Sequence[str] = (),
        bias: Sequence[str] = (),
        **layers: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dims = head_dims
        self.key_dims = key_dims or head_dims
        # The mixer divides by sqrt(d) itself.
        factor = 1.0 if scale is None else scale * math.sqrt(self.key_dims)
        self.query_factor = None if math.isclose(factor, 1.0) else factor
        kept = {name: getattr(build.attention, name, None) for name in keep}
        for name, layer in {**kept, **layers}.items():
            setattr(self, name, layer)
        self.mixer = build(num_heads, head_dims, key_dims)
        self._take_bias(build, bias)
        self.grid, self.extra_tokens = build.grid, build.extra_tokens
        self.grid_source, self.token_size = build.grid_source, build.token_size

    def _take_bias(self, build: MixerBuilder, names: Sequence[str]) -> None:
        old, self.bias_names = build.attention, []
        names = [name for name in names if getattr(old, name, None) is not None]
        if names:
            note_bias(build, self.mixer)
        self.gone_names = [] if self.mixer.uses_bias else names
        if not self.mixer.uses_bias:
            return
        self.bias_names = names
        for name in names:
            value = getattr(old, name)
            if name in old._buffers:
                persistent = name not in old._non_persistent_buffers_set
                self.register_buffer(name, value, persistent=persistent)
            else:
                setattr(self, name, value)

    def switch_to_deploy(self) -> None:
        """Drop what served a bias of the logits, unless the mixer still has logits."""
        if not isinstance(self.mixer, SoftmaxMixer):
            for name in self.bias_names:
                if hasattr(self, name):  # not what a caller has given
                    delattr(self, name)
            self.gone_names, self.bias_names = self.bias_names or self.gone_names, []

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        forget(state_dict, prefix, self.gone_names)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def find_grid(self, num_tokens: int) -> Grid:
        """The grid of the tokens: the one given, or that of the map they came from.

        Raises:
            ValueError: If there is none, or it does not fit the number of tokens.
        """
        patches = num_tokens - self.extra_tokens
        grid = self._latest_grid(patches)
        # A traced number is a tensor, about which no question can be asked.
        if grid is not None and (torch.jit.is_tracing() or math.prod(grid) == patches):
            return grid
        met = f"{num_tokens} tokens, {self.extra_tokens} of them not on the grid"
        if self.grid is not None:
            raise OptionError(f"castle was given grid={grid}, but there are {met}")
        seen = "" if grid is None else f" (the map they come from had {grid})"
        raise OptionError(
            f"the grid of {met}, is not known{seen}: say castle(model, grid=(H, W)), "
            f"or {_NEEDS_NO_GRID}"
        )

    def _latest_grid(self, patches: int) -> Grid | None:
        if self.grid is not None or self.grid_source is None:
            return self.grid
        rows, columns = self.token_size
        grid = self.grid_source.find(patches * rows * columns)
        if grid is None or self.token_size == (1, 1):
            return grid
        return -(-grid[0] // rows), -(-grid[1] // columns)

    def _grid_for_mixer(self, num_tokens: int) -> Grid | None:
        if self.mixer.uses_grid:
            return self.find_grid(num_tokens)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None  # a look at the sizes might narrow a graph down
        patches = num_tokens - self.extra_tokens
        grid = self._latest_grid(patches)
        return None if grid is None or math.prod(grid) != patches else grid

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens ``(B, N, C)`` to q, k and v, each ``(B, h, N, d)``."""
        return split_qkv(apply_layer(self.qkv, x), self.num_heads)

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid | None = None,
        bias: Bias | None = None,
    ) -> Tensor:
        """Mix values ``(B, h, N, e)`` over tokens, on the grid given or found.

        ``bias`` computes that of the logits, from what the argument of this name keeps.
        """
        if self.query_factor is not None:
            q = q * self.query_factor
        if grid is None:
            grid = self._grid_for_mixer(v.shape[2])
        y = self.mixer(q, k, v, grid, bias if self.bias_names else None)
        if (
            self.bias_names
            and self.training
            and not (getattr(self.mixer, "mask_is_on", False))
        ):
            # Distributed training waits for the gradient of every parameter.
            names = tuple(self.bias_names)
            unused = [p for n, p in self.named_parameters() if n.startswith(names)]
            y = y + 0.0 * sum(p.sum() for p in unused)
        return y

    def attend(self, x: Tensor) -> Tensor:
        """Project and mix tokens: ``(B, N, C)`` to ``(B, N, h * e)``."""
        return merge_heads(self.mix(*self.project(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Attend, tokens ``(B, N, C)`` to the same."""
        return apply_layer(self.proj, self.attend(x))


def forget(state_dict: dict[str, Tensor], prefix: str, names: Sequence[str]) -> None:
    """Take weights of what is gone out of those that a module is about to load."""
    for name in names:
        for key in list(state_dict):
            if key == f"{prefix}{name}" or key.startswith(f"{prefix}{name}."):
                del state_dict[key]


def note_bias(build: MixerBuilder, mixer: TokenMixer) -> None:
    """Say in the report what becomes of an attention's relative position bias."""
    if not isinstance(mixer, SoftmaxMixer):
        build.note(
            "the relative position bias acts in the auxiliary branch alone, and goes "
            "with it"
            if mixer.uses_bias
            else "the relative position bias is not applied"
        )
