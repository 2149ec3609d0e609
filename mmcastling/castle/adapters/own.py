"""Our own softmax attention, and that of models castled with ``type='softmax'``."""

from __future__ import annotations

from torch import nn

from mmcastling.castle.adapter_registry import register_adapter
from mmcastling.castle.castled_attention import MixerBuilder


@register_adapter("mmcastling.attention.peers.softmax.SoftmaxMixer")
def castle_softmax_mixer(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The mixer alone; a convolution of the same kind is kept."""
    new = build(old.num_heads, old.head_dims, old.key_dims)
    if old.local_conv is not None and str(old.local_conv) == str(new.local_conv):
        new.local_conv = old.local_conv
    return new
