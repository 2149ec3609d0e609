"""MViTv2's pooling attention, on the grid that is not subsampled.

Queries, keys and values all keep the full grid, so that each token has a value of its
own to which the identity term and the local convolution apply; a downsampling block
drops every second row and column of the output. Queries at the tokens that remain are
those of the original, since a padded convolution of stride 2 is one of stride 1 at
every second token. Keys and values that the original subsampled are now more.
"""

from __future__ import annotations

from types import NoneType

from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads
from mmcastling.castle.adapter_registry import CannotCastle, register_adapter
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder

_POOLS = ("pool_q", "pool_k", "pool_v")


class CastledMultiScaleAttention(CastledAttention):
    """``MultiScaleAttention`` of mmpretrain and timm, castled."""

    def forward(self, x: Tensor, in_size: Grid) -> tuple[Tensor, Grid]:
        """Tokens ``(B, H * W, C)`` to ``(B, H' * W', C')`` and ``(H', W')``."""
        grid = (int(in_size[0]), int(in_size[1]))
        q, k, v = self.project(x)
        q = self._pool(q, self.pool_q, self.norm_q, grid)
        k = self._pool(k, self.pool_k, self.norm_k, grid)
        v = self._pool(v, self.pool_v, self.norm_v, grid)
        y = self.mix(q, k, v, grid)
        if self.residual_pooling:
            y = y + q
        rows, columns = self.stride
        y = y.unflatten(2, grid)[:, :, ::rows, ::columns]
        out_size = (y.shape[2], y.shape[3])
        return apply_layer(self.proj, merge_heads(y.flatten(2, 3))), out_size

    @staticmethod
    def _pool(
        x: Tensor, pool: nn.Conv2d | None, norm: nn.Module | None, grid: Grid
    ) -> Tensor:
        """Pool ``(B, h, N, d)`` over its grid."""
        if pool is None:
            return x
        batch = x.shape[0]
        x = pool(x.unflatten(2, grid).flatten(0, 1).permute(0, 3, 1, 2))
        return norm(x.flatten(2).transpose(1, 2).unflatten(0, (batch, -1)))


@register_adapter("mmpretrain.models.backbones.mvit.MultiScaleAttention")
def castle_multi_scale_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """MViTv2's attention; its relative positions are dropped."""
    stride = old.pool_q.stride
    if old.pool_k.stride != stride or stride != (1, 1):
        build.note("keys and values are no longer subsampled, only the output is")
    return CastledMultiScaleAttention(
        build,
        old.num_heads,
        old.out_dims // old.num_heads,
        scale=old.scale,
        keep=("qkv", "norm_q", "norm_k", "norm_v", "proj", "residual_pooling"),
        stride=stride,
        **{name: _at_stride_1(getattr(old, name)) for name in _POOLS},
    )


@register_adapter("timm.models.mvitv2.MultiScaleAttention")
def castle_timm_multi_scale_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """timm's MViTv2's attention; its relative positions are dropped."""
    pools = {name: getattr(old, name) for name in _POOLS}
    if old.has_cls_token:
        raise CannotCastle("its class token is pooled apart from the map's")
    if old.unshared or not all(
        isinstance(p, nn.Conv2d | NoneType) for p in pools.values()
    ):
        raise CannotCastle("it pools maps other than by a convolution per head")
    strides = {name: getattr(pool, "stride", (1, 1)) for name, pool in pools.items()}
    if set(strides.values()) != {(1, 1)}:
        build.note("keys and values are no longer subsampled, only the output is")
    return CastledMultiScaleAttention(
        build,
        old.num_heads,
        old.head_dim,
        scale=old.scale,
        keep=("qkv", "norm_q", "norm_k", "norm_v", "proj", "residual_pooling"),
        stride=strides["pool_q"],
        **{name: _at_stride_1(pool) for name, pool in pools.items()},
    )


def _at_stride_1(pool: nn.Conv2d | None) -> nn.Conv2d | None:
    """A convolution with the same parameters that keeps the grid."""
    if pool is None:
        return None
    new = nn.Conv2d(
        *(pool.in_channels, pool.out_channels, pool.kernel_size),
        padding=pool.padding,
        groups=pool.groups,
        bias=pool.bias is not None,
        device="meta",
    )
    new.weight, new.bias = pool.weight, pool.bias
    return new.train(pool.training)
