"""Attentions of plain vision transformers: one ``qkv`` layer, all tokens at once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.local_conv import merge_heads, split_qkv
from mmcastling.castle.adapter_registry import CannotCastle, register_adapter
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder
from mmcastling.errors import OptionError


class CastledMultiheadAttention(CastledAttention):
    """mmpretrain's ``MultiheadAttention``, castled."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        x = self.proj(merge_heads(self.mix(q, k, v)))
        x = self.out_drop(self.gamma1(self.proj_drop(x)))
        return v.squeeze(1) + x if self.v_shortcut else x


@register_adapter("mmpretrain.models.utils.attention.MultiheadAttention")
def castle_multihead_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """ViT, DeiT, DINOv2, MAE, CLIP's and others' attention in mmpretrain."""
    if isinstance(old.scaled_dot_product_attention, functools.partial):
        raise CannotCastle("it has a qk_scale, which mmpretrain applies as a divisor")
    build.note_dropout(old.attn_drop)
    names = ("qkv", "proj", "proj_drop", "gamma1", "out_drop", "v_shortcut")
    return CastledMultiheadAttention(build, old.num_heads, old.head_dims, keep=names)


class CastledBEiTAttention(CastledAttention):
    """BEiT's attention, castled; without relative position bias."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.q_bias is None:
            return super().project(x)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = nn.functional.linear(x, self.qkv.weight, bias)
        return split_qkv(qkv, self.num_heads)

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        """Attend; a bias that the backbone shares among its blocks is not applied."""
        return self.proj_drop(self.proj(self.attend(x)))


@register_adapter("mmpretrain.models.utils.attention.BEiTAttention")
@register_adapter("mmseg.models.backbones.beit.BEiTAttention")
def castle_beit_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """BEiT's attention in mmpretrain, and BEiT's and MAE's in mmseg."""
    build.note_dropout(old.attn_drop)
    if getattr(old, "relative_position_bias_table", None) is None:
        build.note("a relative position bias shared by the backbone is not applied")
    return CastledBEiTAttention(
        build,
        old.num_heads,
        old.embed_dims // old.num_heads,
        scale=old.scale,
        keep=("qkv", "q_bias", "v_bias", "proj", "proj_drop"),
    )


class CastledTimmAttention(CastledAttention):
    """timm's ``Attention``, castled."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend, without a mask.

        Raises:
            ValueError: If a mask is asked for.
        """
        if attn_mask is not None or is_causal:
            raise OptionError(
                "a castled attention takes no attn_mask and is not causal: linear "
                "attention sums over all tokens before it sees a query"
            )
        q, k, v = self.project(x)
        y = merge_heads(self.mix(self.q_norm(q), self.k_norm(k), v))
        if self.norm is not None:
            y = self.norm(y)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


@register_adapter("timm.models.vision_transformer.Attention")
def castle_timm_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The attention of timm's ViT and DeiT; releases of timm differ in its options."""
    build.note_dropout(old.attn_drop)
    return CastledTimmAttention(
        build,
        old.num_heads,
        old.head_dim,
        scale=old.scale,
        keep=("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"),
    )


class CastledSelfAttention(CastledAttention):
    """``nn.MultiheadAttention`` as self-attention, castled."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """Attend, ``(B, N, C)`` three times the same to ``(B, N, C)`` and None.

        Raises:
            ValueError: If the three differ, or a mask or the weights are asked for.
        """
        given = [
            name
            for name, value in options.items()
            if value is not None and value is not False
        ]
        # Backward hooks make three tensors of one, in the same memory.
        same = all(x is query or x.is_set_to(query) for x in (key, value))
        if given or not same:
            raise OptionError(
                "a castled nn.MultiheadAttention attends from tokens to themselves, "
                f"without masks and weights; it was given {given or 'other keys'}. "
                "Leave it out with castle's predicate"
            )
        return self.proj(self.attend(query)), None


@register_adapter(
    "torch.nn.modules.activation.MultiheadAttention",
    inside="torchvision.models.vision_transformer.EncoderBlock",
)
def castle_torch_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """``nn.MultiheadAttention`` in torchvision's ViT; ``in_proj`` becomes ``qkv``."""
    if old.in_proj_weight is None or old.bias_k is not None or old.add_zero_attn:
        raise CannotCastle("it has separate projections or added keys")
    if not old.batch_first:
        raise CannotCastle("it is not batch_first")
    build.note_dropout(old.dropout)
    weight, bias = old.in_proj_weight, old.in_proj_bias
    qkv = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    qkv.weight, qkv.bias = weight, bias
    return CastledSelfAttention(
        build,
        old.num_heads,
        old.head_dim,
        qkv=qkv,
        proj=old.out_proj,
    )
