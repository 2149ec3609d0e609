"""Attentions of plain vision transformers: one ``qkv`` layer, all tokens at once."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads
from mmcastling.castle.adapter_registry import register_adapter
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder


class CastledMultiheadAttention(CastledAttention):
    """mmpretrain's ``MultiheadAttention``, castled."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        x = apply_layer(self.proj, merge_heads(self.mix(q, k, v)))
        x = self.out_drop(self.gamma1(self.proj_drop(x)))
        return v.squeeze(1) + x if self.v_shortcut else x


@register_adapter("mmpretrain.models.utils.attention.MultiheadAttention")
def castle_multihead_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """ViT, DeiT, DINOv2, MAE, CLIP's, T2T-ViT's and others' attention in mmpretrain."""
    build.note_dropout(old.attn_drop)
    scale = None
    if isinstance(old.scaled_dot_product_attention, functools.partial):
        # Of T2T-ViT, for one. It divides by what others multiply by.
        scale = 1.0 / old.scaled_dot_product_attention.keywords["scale"]
    if build.is_inside("T2TModule"):
        build.extra_tokens = 0  # the class token comes after
    return CastledMultiheadAttention(
        build,
        old.num_heads,
        old.head_dims,
        scale=scale,
        keep=("qkv", "proj", "proj_drop", "gamma1", "out_drop", "v_shortcut"),
    )


class CastledRotaryAttention(CastledAttention):
    """EVA-02's ``AttentionWithRoPE``, castled; queries and keys are rotated."""

    def forward(self, x: Tensor, patch_resolution: Grid) -> Tensor:
        """Attend, tokens ``(B, N, C)`` to the same."""
        q, k, v = self.project(x)
        if self.rope is not None:
            extra = int(self.with_cls_token)
            q, k = (
                torch.cat(
                    (t[:, :, :extra], self.rope(t[:, :, extra:], patch_resolution)), 2
                )
                for t in (q, k)
            )
        grid = (int(patch_resolution[0]), int(patch_resolution[1]))
        return self.proj_drop(
            apply_layer(self.proj, merge_heads(self.mix(q, k, v, grid)))
        )


@register_adapter("mmpretrain.models.backbones.vit_eva02.AttentionWithRoPE")
def castle_rotary_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The attention of mmpretrain's ``ViTEVA02``."""
    build.note_dropout(old.attn_drop)
    return CastledRotaryAttention(
        build,
        old.num_heads,
        old.head_dims,
        scale=old.scale,
        keep=("qkv", "rope", "with_cls_token", "proj", "proj_drop"),
    )
