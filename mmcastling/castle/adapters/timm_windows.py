"""timm's attentions in windows: Swin, SwinV2, its CR variant, Twins.

A block of Swin hands its windows over one by one, with a mask where they are shifted.
The map's size, which only the block sees, says which of them that concerns.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads
from mmcastling.castle.adapter_registry import register_adapter
from mmcastling.castle.adapters.biased import CastledBiasedAttention
from mmcastling.castle.adapters.swin import (
    CastledCosineAttention,
    attend_in_windows,
    window_bias,
)
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder

_LAYERS = ("qkv", "q_bias", "v_bias", "logit_scale", "proj", "proj_drop", "window_size")


class CastledTimmWindow(CastledCosineAttention):
    """The attention in a window of timm's Swin transformers, castled.

    Args:
        build: What the adapter was given.
        bias: Names of what serves the bias of relative positions.
    """

    def __init__(self, build: MixerBuilder, bias: tuple[str, ...]) -> None:
        old = build.attention
        build.listen_to(build.holders[0])
        build.grid, build.extra_tokens = old.window_size, 0
        build.note_dropout(old.attn_drop)
        super().__init__(
            build,
            old.num_heads,
            old.qkv.out_features // 3 // old.num_heads,
            scale=getattr(old, "scale", 1.0),  # a learned one, in SwinV2
            keep=(*_LAYERS, "window_area"),
            bias=bias,
        )
        block = build.holders[0]
        self.shift_size = block.shift_size
        self.usual_size = getattr(block, "input_resolution", None) or block.feat_size
        names = ("_get_rel_pos_bias", "_relative_positional_encodings")
        methods = [getattr(type(old), name, None) for name in names]
        self.bias_method = methods[0] or methods[1]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.logit_scale is None:
            return CastledBiasedAttention.project(self, x)
        return super().project(x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend, windows of tokens ``(B * windows, N, C)`` to the same.

        What the mask forbids is found from the shift.
        """
        bias = self.logits_bias if self.bias_names else None
        if not any(self.shift_size):
            y = merge_heads(self.mix(*self.project(x), self.window_size, bias))
        else:
            tall, wide = self.window_size
            # A graph of torch.fx calls no hook of a block.
            height, width = self.grid_source.find(0) or self.usual_size
            grid = (-(-height // tall), -(-width // wide))
            x = x.unflatten(0, (-1, *grid)).unflatten(3, self.window_size)
            x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, H, W, C)
            y = attend_in_windows(self, x, self.window_size, self.shift_size, bias)
            y = y.unflatten(2, (-1, wide)).unflatten(1, (-1, tall)).transpose(2, 3)
            y = y.flatten(3, 4).flatten(0, 2)
        return self.proj_drop(apply_layer(self.proj, y))

    def logits_bias(self) -> Tensor:
        """The bias of the logits, ``(1, h, N, N)``."""
        if self.bias_method is not None:
            return self.bias_method(self)
        return window_bias(self)


_BIASES = {
    "timm.models.swin_transformer.WindowAttention": (
        "relative_position_bias_table",
        "relative_position_index",
    ),
    "timm.models.swin_transformer_v2.WindowAttention": (
        "cpb_mlp",
        "relative_coords_table",
        "relative_position_index",
    ),
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": (
        "meta_mlp",
        "relative_coordinates_log",
    ),
}


def castle_timm_window(
    old: nn.Module, build: MixerBuilder, bias: tuple[str, ...]
) -> CastledTimmWindow:
    """The attention in the windows of a Swin transformer."""
    return CastledTimmWindow(build, bias)


for _path, _bias in _BIASES.items():
    register_adapter(_path)(functools.partial(castle_timm_window, bias=_bias))


class CastledLocalAttention(CastledAttention):
    """Twins' attention within groups, castled."""

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        """Attend, tokens ``(B, H * W, C)`` of a map of that size to the same."""
        height, width = size
        pad = (0, 0, 0, -width % self.ws, 0, -height % self.ws)
        x = nn.functional.pad(x.unflatten(1, (height, width)), pad)
        y = attend_in_windows(self, x, (self.ws, self.ws))[:, :height, :width]
        return self.proj_drop(apply_layer(self.proj, y.flatten(1, 2)))


@register_adapter("timm.models.twins.LocallyGroupedAttn")
def castle_local_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """Twins-SVT's locally grouped attention."""
    build.note_dropout(old.attn_drop)
    build.grid, build.grid_source = (old.ws, old.ws), None
    return CastledLocalAttention(
        build,
        old.num_heads,
        old.dim // old.num_heads,
        scale=old.scale,
        keep=("qkv", "proj", "proj_drop", "ws"),
    )
