"""BEiT's attention, which has biases of queries and values, and of pairs of tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import merge_heads, split_qkv
from mmcastling.castle.adapter_registry import register_adapter
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder


class CastledBiasedAttention(CastledAttention):
    """An attention with biases of its queries and values apart, castled."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.q_bias is None:
            return super().project(x)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return split_qkv(apply_layer(self.qkv, x) + bias, self.num_heads)


def table_bias(attention: CastledAttention) -> Tensor:
    """The bias of a table of relative positions, ``(1, h, N, N)``."""
    table = attention.relative_position_bias_table[attention.relative_position_index]
    return table.permute(2, 0, 1).unsqueeze(0)


TABLE = ("relative_position_bias_table", "relative_position_index")
"""What serves such a bias."""


class CastledBEiTAttention(CastledBiasedAttention):
    """BEiT's attention, castled."""

    def forward(
        self,
        x: Tensor,
        rel_pos_bias: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend; a bias that the backbone shares among its blocks is not applied."""
        q, k, v = self.project(x)
        y = self.mix(q, k, v, bias=functools.partial(table_bias, self))
        return self.proj_drop(apply_layer(self.proj, merge_heads(y)))


@register_adapter("mmpretrain.models.utils.attention.BEiTAttention")
@register_adapter("mmseg.models.backbones.beit.BEiTAttention")
def castle_beit_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """BEiT's attention in mmpretrain, and BEiT's and MAE's in mmseg."""
    build.note_dropout(old.attn_drop)
    build.drop_shared("rel_pos_bias")
    return CastledBEiTAttention(
        build,
        old.num_heads,
        old.proj.in_features // old.num_heads,
        scale=old.scale,
        keep=("qkv", "q_bias", "v_bias", "proj", "proj_drop"),
        bias=TABLE,
    )
