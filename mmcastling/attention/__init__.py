"""The paper: angular attention, its linear form, and the castling block. Torch only."""

from mmcastling.attention.baselines import SoftmaxAttention, SoftmaxMixer
from mmcastling.attention.block import TokenAttention
from mmcastling.attention.build import (
    ATTENTIONS,
    MIXERS,
    build_attention,
    build_mixer,
)
from mmcastling.attention.castling import (
    CastlingAttention,
    CastlingMixer,
    LinearAngularAttention,
    LinearAngularMixer,
)
from mmcastling.attention.functional import (
    angular_attention,
    angular_similarity,
    angular_similarity_series,
    in_full_precision,
    kernel_attention,
    linear_angular_attention,
    naive_masked_softmax_attention,
    unit_rows,
)
from mmcastling.attention.local_conv import GridConv, TokenConv
from mmcastling.attention.masked_softmax import masked_softmax_attention
from mmcastling.attention.mixer import TokenMixer
from mmcastling.attention.peers import (
    EfficientAttention,
    EfficientMixer,
    FocusedAttention,
    FocusedMixer,
    HydraAttention,
    HydraMixer,
    PerformerAttention,
    PerformerMixer,
    ReLULinearAttention,
    ReLULinearMixer,
)
from mmcastling.attention.threshold import MaskThreshold

__all__ = [
    "ATTENTIONS",
    "MIXERS",
    "CastlingAttention",
    "CastlingMixer",
    "EfficientAttention",
    "EfficientMixer",
    "FocusedAttention",
    "FocusedMixer",
    "GridConv",
    "HydraAttention",
    "HydraMixer",
    "LinearAngularAttention",
    "LinearAngularMixer",
    "MaskThreshold",
    "PerformerAttention",
    "PerformerMixer",
    "ReLULinearAttention",
    "ReLULinearMixer",
    "SoftmaxAttention",
    "SoftmaxMixer",
    "TokenAttention",
    "TokenConv",
    "TokenMixer",
    "angular_attention",
    "angular_similarity",
    "angular_similarity_series",
    "build_attention",
    "build_mixer",
    "in_full_precision",
    "kernel_attention",
    "linear_angular_attention",
    "masked_softmax_attention",
    "naive_masked_softmax_attention",
    "unit_rows",
]
