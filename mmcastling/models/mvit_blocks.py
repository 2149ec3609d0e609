"""MViTv2's blocks: castled, and with the original attention for any image size."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmpretrain.models.backbones.mvit import MultiScaleAttention, MultiScaleBlock
from torch import Tensor, nn

from mmcastling.attention import build_mixer
from mmcastling.attention.fast import apply_layer, fused_inside
from mmcastling.attention.local_conv import Grid, merge_heads, on_grid, split_heads
from mmcastling.attention.recording import is_watched
from mmcastling.models.conv_ffn import ConvMViTMLP


class CastlingMultiScaleAttention(MultiScaleAttention):
    """Pooling attention around a mixer that keeps the grid.

    q, k and v each go through a 3x3 depthwise convolution of stride 1 and a norm, are
    mixed on the full grid, and the pooled q is added (residual pooling). A block that
    downsamples then applies one more such convolution, of stride 2, and a norm to each
    head's output. The original pools keys and values to a coarse grid, queries to the
    output's, and adds relative positions to the logits: linear attention needs one grid
    for all three and has no logits. Parameters keep mmpretrain's names.

    Args:
        *args, **kwargs: Of mmpretrain's ``MultiScaleAttention``.
        stride_q: Stride of the output, 1 or 2. Defaults to 1.
        attention, deploy: As of :func:`mmcastling.attention.build_mixer`.
    """

    def __init__(
        self,
        *args: Any,
        stride_q: int = 1,
        attention: dict[str, Any] | None = None,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, rel_pos_spatial=False, **kwargs)
        head_dims = self.out_dims // self.num_heads
        self.mixer = build_mixer(attention, self.num_heads, head_dims, deploy=deploy)
        self.pool_out = None
        if stride_q > 1:
            self.pool_out = nn.Conv2d(
                head_dims,
                head_dims,
                self.pool_q.kernel_size,
                stride=stride_q,
                padding=self.pool_q.padding,
                groups=head_dims,
                bias=False,
            )
            self.norm_out = copy.deepcopy(self.norm_q)

    def init_weights(self) -> None:
        BaseModule.init_weights(self)  # there are no relative positions

    def forward(self, x: Tensor, in_size: Grid) -> tuple[Tensor, Grid]:
        """``(B, H * W, in_dims)`` to ``(B, H' * W', out_dims)`` and ``(H', W')``."""
        qkv, _ = self._pool(
            (self.pool_q, self.pool_k, self.pool_v), apply_layer(self.qkv, x), in_size
        )
        norms = (self.norm_q, self.norm_k, self.norm_v)
        q, k, v = (
            norm(split_heads(pooled, self.num_heads).transpose(1, 2)).transpose(1, 2)
            for norm, pooled in zip(norms, qkv.chunk(3, dim=2), strict=True)
        )
        y = self.mixer(q, k, v, in_size)
        if self.residual_pooling:
            y = y + q
        y, grid = merge_heads(y), in_size  # (B, H*W, out_dims)
        if self.pool_out is not None:
            y, grid = self._pool((self.pool_out,), y, in_size)
            y = self.norm_out(y.unflatten(2, (self.num_heads, -1))).flatten(2)
        return apply_layer(self.proj, y), grid

    def _pool(
        self, convolutions: Sequence[nn.Conv2d], x: Tensor, grid: Grid
    ) -> tuple[Tensor, Grid]:
        """One depthwise convolution in place of several, over all heads of each.

        Those have one stride and padding; each acts on its ``out_dims`` of the channels
        of ``x``, alike in every head. What is wrapped, replaced or hooked is called.
        """
        if any(type(c) is not nn.Conv2d or is_watched(c) for c in convolutions):
            parts = x.chunk(len(convolutions), 2)
            pairs = zip(convolutions, parts, strict=True)
            parts, grids = zip(*(self._pool_one(*p, grid) for p in pairs), strict=True)
            return torch.cat(parts, dim=2), grids[0]
        first = convolutions[0]
        weight = torch.cat(
            [conv.weight.repeat(self.num_heads, 1, 1, 1) for conv in convolutions]
        )
        convolve = functools.partial(
            nn.functional.conv2d,
            weight=weight,
            stride=first.stride,
            padding=first.padding,
            groups=weight.shape[0],
        )
        return on_grid(convolve, x, grid)

    def _pool_one(
        self, convolution: nn.Module, x: Tensor, grid: Grid
    ) -> tuple[Tensor, Grid]:
        """Call a convolution on each head of ``(B, N, out_dims)``."""
        x = split_heads(x, self.num_heads)  # (B, h, N, d)
        y, grid = on_grid(convolution, x.flatten(0, 1), grid)
        return merge_heads(y.unflatten(0, x.shape[:2])), grid


class SoftmaxMultiScaleAttention(MultiScaleAttention):
    """The published pooling attention, for usual grids that are not square too.

    Its tables of relative positions are resized, on another grid in the forward as in
    mmpretrain, and when weights of another image size are loaded.
    """

    def __init__(
        self, input_size: Grid, rel_pos_spatial: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(rel_pos_spatial=False, **kwargs)
        self.rel_pos_spatial = rel_pos_spatial
        if rel_pos_spatial:
            strides = self.pool_q.stride[0], self.pool_k.stride[0]
            for name, size in zip(("h", "w"), input_size, strict=True):
                longest = max(1, *(size // stride for stride in strides))
                head_dims = self.out_dims // self.num_heads
                table = nn.Parameter(torch.zeros(2 * longest - 1, head_dims))
                self.register_parameter(f"rel_pos_{name}", table)
            self._register_load_state_dict_pre_hook(self._prepare_rel_pos)

    def forward(self, *args: Any) -> tuple[Tensor, Grid]:
        with fused_inside(self):
            return super().forward(*args)

    def init_weights(self) -> None:
        if self.rel_pos_spatial:
            super().init_weights()
        else:
            BaseModule.init_weights(self)

    def _prepare_rel_pos(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        for name in ("rel_pos_h", "rel_pos_w"):
            table, own = state_dict.get(prefix + name), getattr(self, name)
            if table is not None and table.shape[0] != own.shape[0]:
                state_dict[prefix + name] = nn.functional.interpolate(
                    table.t()[None], size=own.shape[0], mode="linear"
                )[0].t()


class CastlingMultiScaleBlock(MultiScaleBlock):
    """MViTv2's block whose attention and MLP know the grid of tokens.

    Args:
        input_size: Usual grid ``(H, W)`` of the tokens that enter.
        attention, ffn_conv, deploy: As of the backbone; ``dict(type='softmax')`` alone
            is the published attention, which ``stride_kv`` and ``rel_pos_spatial`` are
            for.
        **kwargs: Further arguments of mmpretrain's ``MultiScaleBlock``.
    """

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        num_heads: int,
        input_size: Grid,
        attention: dict[str, Any] | None = None,
        ffn_conv: int = 0,
        stride_q: int = 1,
        stride_kv: int = 1,
        rel_pos_spatial: bool = True,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_dims,
            out_dims,
            num_heads,
            stride_q=stride_q,
            rel_pos_spatial=False,
            input_size=input_size,
            **kwargs,
        )
        attn_dims = self.attn.out_dims
        names = ("qkv_bias", "norm_cfg", "residual_pooling", "rel_pos_zero_init")
        shared = dict(
            {name: kwargs[name] for name in names if name in kwargs},
            in_dims=in_dims,
            out_dims=attn_dims,
            num_heads=num_heads,
            pool_kernel=kwargs.get("qkv_pool_kernel", (3, 3)),
            stride_q=stride_q,
        )
        if attention is not None and dict(attention) == {"type": "softmax"}:
            self.attn = SoftmaxMultiScaleAttention(
                input_size, rel_pos_spatial, stride_kv=stride_kv, **shared
            )
        else:
            self.attn = CastlingMultiScaleAttention(
                attention=attention, deploy=deploy, **shared
            )
        self.mlp = ConvMViTMLP(
            attn_dims,
            ffn_conv,
            hidden_channels=self.mlp.fc1.out_features,
            out_channels=out_dims,
            act_cfg=kwargs.get("act_cfg", dict(type="GELU")),
        )

    def forward(self, x: Tensor, in_size: Grid) -> tuple[Tensor, Grid]:
        """``(B, H * W, in_dims)`` to ``(B, H' * W', out_dims)`` and ``(H', W')``."""
        normed = self.norm1(x)
        attended, grid = self.attn(normed, in_size)
        # Channels grow in the attention, or else in the MLP.
        grows_here = self.proj is not None and self.dim_mul_in_attention
        skip = apply_layer(self.proj, normed) if grows_here else x
        if self.pool_skip is not None:
            skip, _ = on_grid(self.pool_skip, skip, in_size)
        x = skip + self.drop_path(attended)
        normed = self.norm2(x)
        grows_here = self.proj is not None and not self.dim_mul_in_attention
        skip = apply_layer(self.proj, normed) if grows_here else x
        return skip + self.drop_path(self.mlp(normed, grid)), grid
