"""LeViT's attentions, whose values are wider than their keys.

LeViT has no extra tokens. Its grid is that of its convolutions, and of the subsampling
that the tokens have passed since.
"""

from __future__ import annotations

from torch import Tensor, nn

from mmcastling.attention.local_conv import merge_heads, split_heads
from mmcastling.castle.adapter_registry import register_adapter
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder


class CastledLeViTAttention(CastledAttention):
    """LeViT's ``Attention``, castled; without attention bias."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        widths = [self.key_dims, self.key_dims, self.head_dims]
        return split_heads(self.qkv(x), self.num_heads).split(widths, dim=-1)


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
