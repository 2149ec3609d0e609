"""timm's attentions: one castled class, and a table of what theirs differ in.

Nearly all of them project tokens or a map, perhaps norm and rotate queries and keys,
attend, perhaps norm and gate the result, and project back.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads, split_heads
from mmcastling.attention.peers.softmax import SoftmaxMixer
from mmcastling.castle.adapter_registry import CannotCastle, register_adapter
from mmcastling.castle.adapters.map_attention import decomposed_bias
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder
from mmcastling.errors import OptionError

FEWER_KEYS = "its keys and values are fewer than its queries (spatially reduced)"


@dataclass(frozen=True)
class Kind:
    """What is special to the attentions of a class.

    Args:
        arguments: Names of what ``forward`` takes beside the tokens.
        layout: Of its input: ``'tokens'`` ``(B, N, C)``, ``'groups'`` ``(B, T, N, C)``,
            ``'map'`` ``(B, H, W, C)``, ``'image'`` ``(B, C, H, W)``, or ``'units'``
            ``(B, N T, C)`` of ``T`` windows.
        projections: Names of the layers that make queries, keys and values.
        heads_first: Whether their channels are ``(h, q k v)``, not ``(q k v, h)``.
        keep: Names of further layers and settings to keep.
        bias: Names of what serves a bias of the logits alone.
        bias_of: Computes that, of the castled attention, its queries and their grid.
        pre_norm: Whether ``norm`` acts on its input.
    """

    arguments: tuple[str, ...] = ()
    layout: str = "tokens"
    projections: tuple[str, ...] = ("qkv",)
    heads_first: bool = False
    keep: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()
    bias_of: Callable[[CastledAttention, Tensor, Grid | None], Tensor] | None = None
    pre_norm: bool = False


_ALWAYS = ("q_bias", "v_bias", "q_norm", "k_norm", "gate", "proj", "proj_drop")
_PARTS = {"qkv": 3, "qk": 2, "kv": 2}


class CastledTimmAttention(CastledAttention):
    """An attention of timm, castled.

    Args:
        build: What the adapter was given.
        kind: What is special to its class.
        **layers: As of :class:`CastledAttention`.
    """

    def __init__(self, build: MixerBuilder, kind: Kind, **layers: Any) -> None:
        old = build.attention
        heads, keys, values = _sizes(old)
        build.note_dropout(getattr(old, "attn_drop", 0.0))
        if kind.layout == "units":
            build.off_grid = "its tokens are not in the order of a grid"
            build.grid_source = None
        super().__init__(
            *(build, heads, values, keys),
            scale=getattr(old, "scale", None),
            keep=(*_ALWAYS, *kind.projections, *kind.keep),
            bias=kind.bias,
            **layers,
        )
        self.kind = kind
        self.key_groups = getattr(old, "num_kv_groups", 1)
        self.pool = getattr(old, "pool", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend; input, further arguments and output are those of the original.

        Raises:
            ValueError: If a mask is asked for.
        """
        given = {**dict(zip(self.kind.arguments, args, strict=False)), **kwargs}
        if given.get("attn_mask") is not None or given.get("is_causal"):
            raise OptionError(
                "a castled attention takes no attn_mask and is not causal: linear "
                "attention sums over all tokens before it sees a query"
            )
        if "use_global" in self.kind.keep and not self.use_global:
            given = {}
        layout, shape, grid = self.kind.layout, x.shape, given.get("size")
        if layout == "image":
            grid, x = (shape[2], shape[3]), x.flatten(2).transpose(1, 2)
        elif layout == "map":
            grid, x = (shape[1], shape[2]), x.flatten(1, 2)
        elif layout == "groups":
            x = x.flatten(0, 1)
        elif layout == "units" and self.use_mask_unit_attn:
            x = x.unflatten(1, (self.window_size, -1)).transpose(1, 2).flatten(0, 1)
        y = self._back(self._attend(x, grid, given), grid)
        if layout == "image":
            return y if y.ndim == 4 else y.transpose(1, 2).unflatten(2, grid)
        if layout == "units" and self.use_mask_unit_attn:
            return y.unflatten(0, (shape[0], -1)).transpose(1, 2).flatten(1, 2)
        return y.reshape(*shape[:-1], y.shape[-1])

    def _attend(self, x: Tensor, grid: Grid | None, given: dict[str, Any]) -> Tensor:
        if self.kind.pre_norm:
            x = self.norm(x)
        q, k, v = self.project(x, grid, given.get("q_global"))
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        rope = given.get("rope")
        if "rope" in self.kind.keep and self.rope is not None:
            rope = self.rope.get_embed()
        if rope is not None:
            q, k = (self._rotated(t, rope).type_as(v) for t in (q, k))
        if self.key_groups > 1:
            k, v = (t.repeat_interleave(self.key_groups, dim=1) for t in (k, v))
        bias = None
        if self.bias_names:
            bias = functools.partial(self.logits_bias, q, grid, given)
        y = self.mix(q, k, v, grid, bias)
        inner = self.kind.layout == "groups"  # NesT leaves the heads innermost
        y = y.movedim(1, 3).flatten(2) if inner else merge_heads(y)
        if "norm" in self.kind.keep and not self.kind.pre_norm:
            y = y if self.norm is None else self.norm(y)
        return y if self.gate is None else y * self.gate(x).sigmoid()

    def logits_bias(
        self, q: Tensor, grid: Grid | None, given: dict[str, Any]
    ) -> Tensor:
        """The bias of the logits, ``(1 or B, h, N, N)``."""
        return self.kind.bias_of(self, q, grid)

    def project(
        self, x: Tensor, grid: Grid | None = None, q: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens ``(B, N, C)`` to q, k and v, but for queries that are given.

        Those are ``(B', N, C)``, where ``B'`` divides ``B``.
        """
        dims = (self.key_dims, self.key_dims, self.head_dims)
        heads = [self.num_heads, *[self.num_heads // self.key_groups] * 2]
        widths = [h * d for h, d in zip(heads, dims, strict=True)]
        parts = []
        if q is not None:
            parts = [q.flatten(1, -2).repeat_interleave(len(x) // len(q), dim=0)]
        for name in self.kind.projections:
            layer = getattr(self, name)
            if layer is None:
                continue
            y = self._apply_layer(layer, x, grid)
            if self.q_bias is not None:
                zeros = torch.zeros_like(self.v_bias)
                y = y + torch.cat((self.q_bias, zeros, self.v_bias))
            if self.kind.heads_first:
                return split_heads(y, self.num_heads).split(dims, dim=-1)
            count = _PARTS.get(name, 1) - (q is not None)
            parts += y.split(widths[len(parts) : len(parts) + count], dim=-1)
        return tuple(split_heads(t, h) for t, h in zip(parts, heads, strict=True))

    @staticmethod
    def _apply_layer(layer: nn.Module, x: Tensor, grid: Grid | None) -> Tensor:
        """Apply a layer, or one of images, to tokens ``(B, N, C)``."""
        if grid is None or not any(isinstance(m, nn.Conv2d) for m in layer.modules()):
            return apply_layer(layer, x)
        return layer(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)

    def _back(self, y: Tensor, grid: Grid | None) -> Tensor:
        """Project tokens back; a layer of images leaves an image."""
        if self.proj is not None:
            y = self._apply_layer(self.proj, y, grid)
        if self.pool is not None:
            return self.pool(y.transpose(1, 2).unflatten(2, grid))
        return y if self.proj_drop is None else self.proj_drop(y)

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """Rotate all tokens but those that lead the grid."""
        # SAM's has no tokens that lead the grid, and one way to rotate.
        count = getattr(self, "num_prefix_tokens", None) or 0
        half = bool(getattr(self, "rotate_half", False))
        rotated = self.rotate(x[:, :, count:], rope, half=half)
        return torch.cat((x[:, :, :count], rotated), dim=2) if count else rotated


class CastledSharingAttention(CastledTimmAttention):
    """One whose bias may come from its caller, as all blocks share it.

    That is applied as long as the attention is softmax.
    """

    def __init__(self, build: MixerBuilder, kind: Kind, **layers: Any) -> None:
        super().__init__(build, kind, **layers)
        if isinstance(self.mixer, SoftmaxMixer):
            self.bias_names = [*self.bias_names, "shared"]
        else:
            for name in ("rel_pos_bias", "shared_rel_pos"):
                build.drop_shared(name)

    def logits_bias(
        self, q: Tensor, grid: Grid | None, given: dict[str, Any]
    ) -> Tensor:
        shared = given.get(self.kind.arguments[0])
        own = [n for n in self.bias_names if n != "shared"]
        if not own:
            return torch.zeros((), device=q.device) if shared is None else shared
        bias = self.kind.bias_of(self, q, grid)
        return bias if shared is None else bias + shared


def _sizes(old: nn.Module) -> tuple[int, int, int]:
    """Heads, and channels per head of keys and values."""
    sizes = {}
    for size, names in {
        "heads": ("num_heads", "heads"),
        "keys": ("key_dim", "dim_head_qk", "head_dim", "dim_head"),
        "values": ("val_dim", "dim_head_v"),
    }.items():
        found = (getattr(old, name, None) for name in names)
        sizes[size] = next((value for value in found if value), None)
    if sizes["keys"] is None:
        layer = next(m for m in old.proj.modules() if hasattr(m, "weight"))
        sizes["keys"] = layer.weight.shape[1] // sizes["heads"]
    return sizes["heads"], sizes["keys"], sizes["values"] or sizes["keys"]


# -- biases ----------------------------------------------------------------------------


def _of_method(attention: CastledAttention, q: Tensor, grid: Grid | None) -> Tensor:
    return attention.bias_method(attention)


def _of_module(attention: CastledAttention, q: Tensor, grid: Grid | None) -> Tensor:
    return attention.rel_pos.get_bias()


def _of_offsets(attention: CastledAttention, q: Tensor, grid: Grid | None) -> Tensor:
    return attention.attention_biases[:, attention.attention_bias_idxs].unsqueeze(0)


def _of_positions(attention: CastledAttention, q: Tensor, grid: Grid | None) -> Tensor:
    """BoTNet's."""
    bias = attention.pos_embed(q.flatten(0, 1)).unflatten(0, q.shape[:2])
    return bias * attention.scale if attention.scale_pos_embed else bias


# -- the table -------------------------------------------------------------------------

_MASKS = ("attn_mask", "is_causal")
_ROTARY = ("num_prefix_tokens", "rotate_half")
_OFFSETS = ("attention_biases", "attention_bias_idxs")
_TABLE = ("relative_position_bias_table", "relative_position_index")
_APART = ("q_proj", "k_proj", "v_proj")
_REL_POS = dict(bias=("rel_pos",), bias_of=_of_module)

KINDS = {
    "timm.layers.attention.Attention": Kind(_MASKS, keep=("norm",)),
    "timm.layers.attention.AttentionRope": Kind(
        ("rope", *_MASKS), projections=("qkv", *_APART), keep=("norm", *_ROTARY)
    ),
    "timm.models.eva.EvaAttention": Kind(
        ("rope", *_MASKS), projections=("qkv", *_APART), keep=("norm", *_ROTARY)
    ),
    "timm.layers.attention2d.Attention2d": Kind(("attn_mask",), "image"),
    "timm.layers.bottleneck_attn.BottleneckAttn": Kind(
        layout="image",
        keep=("scale", "scale_pos_embed"),
        bias=("pos_embed",),
        bias_of=_of_positions,
    ),
    "timm.models.beit.Attention": Kind(
        ("shared_rel_pos_bias",),
        keep=("window_size",),
        bias=_TABLE,
        bias_of=_of_method,
    ),
    "timm.models.convit.MHSA": Kind(),
    "timm.models.davit.WindowAttention": Kind(),
    "timm.models.efficientformer.Attention": Kind(
        heads_first=True, bias=_OFFSETS, bias_of=_of_offsets
    ),
    "timm.models.fastvit.Attention": Kind(layout="image"),
    "timm.models.gcvit.WindowAttentionGlobal": Kind(
        ("q_global",), keep=("use_global",), **_REL_POS
    ),
    "timm.models.hiera.MaskUnitAttention": Kind(
        layout="units", keep=("window_size", "use_mask_unit_attn")
    ),
    "timm.models.hieradet_sam2.MultiScaleAttention": Kind(layout="map"),
    "timm.models.levit.Attention": Kind(
        heads_first=True, bias=_OFFSETS, bias_of=_of_offsets
    ),
    "timm.models.maxxvit.Attention2d": Kind(("shared_rel_pos",), "image", **_REL_POS),
    "timm.models.maxxvit.AttentionCl": Kind(("shared_rel_pos",), "map", **_REL_POS),
    "timm.models.metaformer.Attention": Kind(),
    "timm.models.nest.Attention": Kind(layout="groups"),
    "timm.models.nextvit.EfficientAttention": Kind(projections=("q", "k", "v")),
    "timm.models.pvt_v2.Attention": Kind(("size",), projections=("q", "kv")),
    "timm.models.tiny_vit.Attention": Kind(
        heads_first=True,
        keep=("norm",),
        bias=_OFFSETS,
        bias_of=_of_offsets,
        pre_norm=True,
    ),
    "timm.models.tnt.Attention": Kind(projections=("qk", "v")),
    "timm.models.twins.GlobalSubSampleAttn": Kind(("size",), projections=("q", "kv")),
    "timm.models.vision_transformer_relpos.RelPosAttention": Kind(
        ("shared_rel_pos",), **_REL_POS
    ),
    "timm.models.vision_transformer_sam.Attention": Kind(
        layout="map",
        keep=("rope",),
        bias=("rel_pos_h", "rel_pos_w"),
        bias_of=decomposed_bias,
    ),
    "timm.models.visformer.Attention": Kind(layout="image"),
    "timm.models.volo.Attention": Kind(layout="map"),
}


def castle_timm_attention(
    old: nn.Module, build: MixerBuilder, kind: Kind
) -> CastledTimmAttention:
    """An attention that :data:`KINDS` names."""
    if getattr(old, "sr", None) is not None or getattr(old, "sr_ratio", 1) > 1:
        raise CannotCastle(FEWER_KEYS)
    if getattr(old, "q_pool", None) is not None or getattr(old, "q_stride", 1) > 1:
        raise CannotCastle("its queries are pooled: fewer than its keys and values")
    names = vars(sys.modules[type(old).__module__])
    layers: dict[str, Any] = dict(rotate=names.get("apply_rot_embed_cat"))
    if kind.bias_of is _of_method:
        layers["bias_method"] = type(old)._get_rel_pos_bias
    if getattr(old, "head_first", False):
        kind = replace(kind, heads_first=True)
    if getattr(old, "use_conv", False):
        kind = replace(kind, layout="image")
    _know_grid(old, build)
    sharing = kind.arguments[:1] in (("shared_rel_pos",), ("shared_rel_pos_bias",))
    castled = CastledSharingAttention if sharing else CastledTimmAttention
    return castled(build, kind, **layers)


def _know_grid(old: nn.Module, build: MixerBuilder) -> None:
    """The grid where it is not that of the map which the tokens come from."""
    size = old.window_size if type(old).__name__.startswith("Window") else None
    inside = {type(holder).__name__: holder for holder in build.holders}
    if "TinyVitBlock" in inside:
        size = old.resolution
    elif "NestLevel" in inside:
        size = [inside["NestLevel"].block_size] * 2
    elif "TNT" in inside and build.holders[0].attn_in is old:
        size = inside["TNT"].pixel_embed.new_patch_size
    elif "MobileVitBlock" in inside:
        build.token_size = inside["MobileVitBlock"].patch_size
    elif "CrossVit" in inside:
        branches = inside["MultiScaleBlock"].blocks
        (index,) = (i for i, b in enumerate(branches) if b in build.holders)
        build.listen_to(inside["CrossVit"].patch_embed[index].proj)
        build.extra_tokens = 1
    if size is not None:
        build.grid, build.extra_tokens = tuple(size), 0


for _path, _kind in KINDS.items():
    register_adapter(_path)(functools.partial(castle_timm_attention, kind=_kind))
