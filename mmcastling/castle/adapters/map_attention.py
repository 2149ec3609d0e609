"""The attention of SAM's and ViTDet's encoders, with decomposed relative positions.

The bias of a pair's logit is a sum of two, each the product of the query with a learned
vector for their distance, in rows and in columns.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads
from mmcastling.castle.adapter_registry import register_adapter
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder
from mmcastling.errors import OptionError


class CastledMapAttention(CastledAttention):
    """An attention on a map, or on windows of it as its batch, castled."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend, ``(B, H, W, C)`` to the same."""
        grid = (x.shape[1], x.shape[2])
        q, k, v = self.project(x.flatten(1, 2))
        bias = functools.partial(decomposed_bias, self, q, grid)
        y = merge_heads(self.mix(q, k, v, grid, bias))
        return apply_layer(self.proj, y).unflatten(1, grid)


class CastledVisionAttention(CastledMapAttention):
    """The same where transformers calls it."""

    def forward(
        self, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, None]:
        """Attend; there are no attention weights to give back.

        Raises:
            ValueError: If they are asked for.
        """
        check_output_attentions(output_attentions)
        return super().forward(hidden_states), None


def check_output_attentions(asked: bool | None) -> None:
    """Raise OptionError if attention weights are asked for."""
    if asked:
        raise OptionError(
            "a castled attention has no weights to give back: leave out "
            "output_attentions=True"
        )


def decomposed_bias(attention: CastledAttention, q: Tensor, grid: Grid) -> Tensor:
    """The bias for queries ``(B, h, H * W, d)``, ``(B, h, H * W, H * W)``."""
    q = q.unflatten(2, grid)  # (B, h, H, W, d)
    rows = _by_distance(attention.rel_pos_h, grid[0])  # (H, H, d)
    columns = _by_distance(attention.rel_pos_w, grid[1])
    by_row = torch.einsum("bnhwc,hkc->bnhwk", q, rows).unsqueeze(-1)
    by_column = torch.einsum("bnhwc,wkc->bnhwk", q, columns).unsqueeze(-2)
    return (by_row + by_column).flatten(4, 5).flatten(2, 3)


def _by_distance(table: Tensor, size: int) -> Tensor:
    """Vectors ``(distances, d)`` for each pair of places on an axis, ``(S, S, d)``.

    They are resized where there are more or fewer distances than they were trained for.
    """
    distances = 2 * size - 1
    if table.shape[0] != distances:
        resize = nn.functional.interpolate
        table = resize(table.T.unsqueeze(0), size=distances, mode="linear")[0].T
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


@register_adapter("mmpretrain.models.backbones.vit_sam.Attention")
@register_adapter("segment_anything.modeling.image_encoder.Attention")
def castle_map_attention(
    old: nn.Module,
    build: MixerBuilder,
    kind: type[CastledMapAttention] = CastledMapAttention,
) -> nn.Module:
    """The attention of SAM's encoder, global or in windows that the layer cuts."""
    heads = getattr(old, "num_heads", None) or old.num_attention_heads
    build.note_dropout(getattr(old, "dropout", 0.0))
    return kind(
        build,
        heads,
        old.proj.in_features // heads,
        scale=old.scale,
        keep=("qkv", "proj"),
        bias=("rel_pos_h", "rel_pos_w"),
    )


@register_adapter("transformers.models.vitdet.modeling_vitdet.VitDetAttention")
@register_adapter("transformers.models.sam.modeling_sam.SamVisionAttention")
@register_adapter("transformers.models.sam.modeling_sam.SamVisionSdpaAttention")
@register_adapter("transformers.models.sam_hq.modeling_sam_hq.SamHQVisionAttention")
@register_adapter("transformers.models.sam_hq.modeling_sam_hq.SamHQVisionSdpaAttention")
def castle_vision_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """That of ViTDet, SAM and SAM-HQ in transformers."""
    return castle_map_attention(old, build, CastledVisionAttention)
