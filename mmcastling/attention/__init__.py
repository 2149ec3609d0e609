"""The paper: angular attention, its linear form, and the castling block. Torch only."""

from typing import Any

from mmcastling.attention.attention import Attention
from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.build import MIXERS, build_mixer, is_castled
from mmcastling.attention.castling import (
    CastlingMixer,
    LinearAngularMixer,
    MaskedBranch,
)
from mmcastling.attention.functional import (
    angular_attention,
    angular_similarity,
    angular_similarity_series,
    kernel_attention,
    l2_normalize,
    linear_angular_attention,
    naive_masked_softmax_attention,
)
from mmcastling.attention.landmarks import landmark_attention
from mmcastling.attention.local_conv import TokenConv
from mmcastling.attention.masked_softmax import masked_softmax_attention
from mmcastling.attention.mixer import TokenMixer
from mmcastling.attention.threshold import MaskThreshold

__all__ = [
    "MIXERS",
    "Attention",
    "CastlingMixer",
    "LinearAngularMixer",
    "MaskThreshold",
    "MaskedBranch",
    "TokenConv",
    "TokenMixer",
    "angular_attention",
    "angular_similarity",
    "angular_similarity_series",
    "build_mixer",
    "in_full_precision",
    "is_castled",
    "kernel_attention",
    "l2_normalize",
    "landmark_attention",
    "linear_angular_attention",
    "masked_softmax_attention",
    "naive_masked_softmax_attention",
]

_INSTEAD = {
    "ATTENTIONS": "MIXERS, of which Attention holds one",
    "GridConv": "local_conv='grid', whose convolution is an nn.Conv2d",
    "TokenAttention": "Attention",
    "build_attention": "Attention(embed_dims, num_heads, **options)",
    "unit_rows": "l2_normalize",
    **{
        f"{kind.__name__.removesuffix('Mixer')}Attention": (
            f"Attention(embed_dims, num_heads, type={name!r})"
        )
        for name, kind in MIXERS.items()
    },
    **{kind.__name__: f"MIXERS[{name!r}]" for name, kind in MIXERS.items()},
}


def __getattr__(name: str) -> Any:
    if name in _INSTEAD:  # an AttributeError's text would be lost in an import
        raise ImportError(f"mmcastling.attention.{name} is gone: use {_INSTEAD[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
