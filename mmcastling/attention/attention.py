"""A plain attention block: project tokens, mix them, project back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.build import build_mixer
from mmcastling.attention.deploying import fold_layer_scale, without_effect
from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads, split_qkv
from mmcastling.attention.old_names import rename_on_load
from mmcastling.attention.opaque import OpaqueModule
from mmcastling.errors import OptionError


class LayerScale(nn.Module):
    """A learned factor per channel of the last axis, named as mmpretrain names it."""

    def __init__(self, embed_dims: int, init_value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((embed_dims,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Attention(OpaqueModule):
    """The projections of a vision transformer's attention around any mixer.

    With ``type='castling'`` it equals the authors' released block, in training form
    (threshold 0.02) and in deployed form. Parameters have the names of mmpretrain's
    attention, so that the weights of softmax vision transformers load.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Number of heads ``h``, a divisor of ``embed_dims``.
        type: The mixer, a key of :data:`MIXERS`. Defaults to ``'castling'``.
        qkv_bias: Whether ``qkv`` has a bias. Defaults to True.
        proj_bias: Whether ``proj`` has a bias. Defaults to True.
        layer_scale_init_value: Initial factor of a learned scale per channel after
            ``proj``, 0 for none. Defaults to 0.
        proj_drop: Dropout after ``proj``. Defaults to 0.
        deploy: Build the deployed form. Defaults to False.
        **mixer_options: Arguments of the mixer, such as ``local_conv``.

    Raises:
        ValueError: If ``embed_dims`` is not a multiple of ``num_heads``, or the type or
            an option is not known.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        type: str = "castling",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        layer_scale_init_value: float = 0.0,
        proj_drop: float = 0.0,
        deploy: bool = False,
        **mixer_options: Any,
    ) -> None:
        if num_heads < 1 or embed_dims % num_heads:
            raise OptionError(
                f"embed_dims {embed_dims} is not a multiple of num_heads {num_heads}"
            )
        super().__init__()
        self.num_heads = num_heads
        spec = dict(mixer_options, type=type)
        self.mixer = build_mixer(
            spec, num_heads, embed_dims // num_heads, deploy=deploy
        )
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims, bias=proj_bias)
        self.gamma1 = (
            LayerScale(embed_dims, layer_scale_init_value)
            if layer_scale_init_value > 0
            else nn.Identity()
        )
        self.proj_drop = nn.Dropout(proj_drop)
        self._register_load_state_dict_pre_hook(rename_on_load)
        if deploy:
            self.switch_to_deploy()

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Attend, tokens ``(B, N, C)`` to the same.

        The last ``H * W`` of them fill ``grid`` row by row, which only
        ``local_conv='grid'`` needs; tokens before them (a class token) lie outside it.
        """
        q, k, v = split_qkv(
            apply_layer(self.qkv, x), self.num_heads
        )  # each (B, h, N, d)
        y = merge_heads(self.mixer(q, k, v, grid))  # (B, N, C)
        return self.gamma1(self.proj_drop(apply_layer(self.proj, y)))

    def switch_to_deploy(self) -> None:
        """Remove what only training needs, and fold the layer scale into ``proj``.

        Idempotent; the output of inference stays the same up to rounding. A layer scale
        is folded only where the layers are exactly those that were built here, see
        :mod:`mmcastling.attention.deploying`.
        """
        self.mixer.switch_to_deploy()
        if type(self).forward is Attention.forward:
            self.proj, self.gamma1 = fold_layer_scale(
                self.proj, self.gamma1, kinds=[LayerScale], between=[self.proj_drop]
            )
            self.proj_drop = without_effect(self.proj_drop, nn.Dropout)
