"""LeViT's attentions, whose values are wider than their keys.

LeViT has no extra tokens. Its grid is that of its convolutions, and of the subsampling
that the tokens have passed since.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads, split_heads
from mmcastling.castle.adapter_registry import CannotCastle, register_adapter
from mmcastling.castle.adapters.timm_attention import KINDS, CastledTimmAttention
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder


class CastledLeViTAttention(CastledAttention):
    """LeViT's ``Attention``, castled; without attention bias."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        widths = [self.key_dims, self.key_dims, self.head_dims]
        return split_heads(apply_layer(self.qkv, x), self.num_heads).split(
            widths, dim=-1
        )

    def find_grid(self, num_tokens: int) -> Grid:
        """The grid that the stem made, halved as often as tokens were subsampled.

        Subsampling that is not castled notes no grid.
        """
        grid = self._latest_grid(num_tokens)
        if grid is None or torch.jit.is_tracing():
            return super().find_grid(num_tokens)
        while math.prod(grid) > num_tokens:
            grid = -(-grid[0] // 2), -(-grid[1] // 2)
        if math.prod(grid) == num_tokens:
            return grid
        return super().find_grid(num_tokens)


class CastledAttentionSubsample(CastledLeViTAttention):
    """LeViT's ``AttentionSubsample``, castled; without attention bias.

    All tokens attend and the output is subsampled. The projection of the queries acts
    on each token alone, so it works on the full grid as it is.
    """

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, kv = (split_heads(layer(x), self.num_heads) for layer in (self.q, self.kv))
        return q, *kv.split([self.key_dims, self.head_dims], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and subsample, ``(B, H * W, C)`` to ``(B, H' * W', C')``."""
        grid = self.find_grid(x.shape[1])
        y = self.mix(*self.project(x), grid=grid).unflatten(2, grid)
        y = y[:, :, :: self.stride, :: self.stride]
        self.grid_source.note((y.shape[2], y.shape[3]))
        return self.proj(merge_heads(y.flatten(2, 3)))


@register_adapter("mmpretrain.models.backbones.levit.Attention")
def castle_levit_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The attention of a LeViT stage; its attention bias is dropped."""
    return CastledLeViTAttention(build, *_sizes(old, build), keep=("qkv", "proj"))


@register_adapter("mmpretrain.models.backbones.levit.AttentionSubsample")
def castle_attention_subsample(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The attention between LeViT's stages; its attention bias is dropped."""
    # Named q.1 as before; what subsampled the queries is gone.
    q = nn.Sequential(nn.Identity(), old.q[1])
    layers = dict(kv=old.kv, q=q, proj=old.proj, stride=old.stride)
    return CastledAttentionSubsample(build, *_sizes(old, build), **layers)


def _sizes(old: nn.Module, build: MixerBuilder) -> tuple[int, int, int, float]:
    build.grid, build.extra_tokens = None, 0
    return old.num_heads, old.d, old.key_dim, old.scale


class CastledAttentionDownsample(CastledTimmAttention):
    """timm's ``AttentionDownsample``, castled as :class:`CastledAttentionSubsample`."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend and subsample tokens ``(B, H * W, C)`` or a map ``(B, C, H, W)``."""
        image = x.ndim == 4
        grid = x.shape[2:] if image else self.find_grid(x.shape[1])
        x = x.flatten(2).transpose(1, 2) if image else x
        q, kv = (self._apply_layer(layer, x, grid) for layer in (self.q.ln, self.kv))
        kv = split_heads(kv, self.num_heads).split([self.key_dims, self.head_dims], -1)
        bias = (lambda: self.kind.bias_of(self, q, grid)) if self.bias_names else None
        y = self.mix(split_heads(q, self.num_heads), *kv, grid, bias).unflatten(2, grid)
        y = y[:, :, :: self.stride, :: self.stride]
        grid = (y.shape[2], y.shape[3])
        if self.grid_source is not None:
            self.grid_source.note(grid)
        y = self._apply_layer(self.proj, merge_heads(y.flatten(2, 3)), grid)
        return y.transpose(1, 2).unflatten(2, grid) if image else y


@register_adapter("timm.models.levit.AttentionDownsample")
def castle_attention_downsample(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The attention between the stages of timm's LeViT."""
    down = old.q.down
    pool = down if old.use_conv else down.pool
    if pool is not None and pool.kernel_size != 1:
        raise CannotCastle("its queries are averages of tokens")
    kind = KINDS["timm.models.levit.Attention"]
    q = nn.Sequential(OrderedDict(ln=old.q.ln))
    new = CastledAttentionDownsample(build, kind, kv=old.kv, q=q, stride=old.stride)
    if new.bias_names:  # of all queries, as those of a stage have it
        places = torch.arange(old.resolution[0] * old.resolution[1])
        rows, columns = places // old.resolution[1], places % old.resolution[1]
        rows, columns = ((t[:, None] - t).abs() for t in (rows, columns))
        index = (rows * old.resolution[1] + columns).to(old.attention_bias_idxs.device)
        new.register_buffer("attention_bias_idxs", index, persistent=False)
    return new
