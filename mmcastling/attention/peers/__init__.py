"""Published linear attentions to compare castling with, one per file."""

from mmcastling.attention.peers.efficient import (
    EfficientAttention,
    EfficientMixer,
    efficient_attention,
)
from mmcastling.attention.peers.focused import (
    FocusedAttention,
    FocusedConv,
    FocusedMixer,
    focused_features,
)
from mmcastling.attention.peers.hydra import (
    HydraAttention,
    HydraMixer,
    hydra_attention,
)
from mmcastling.attention.peers.performer import (
    PerformerAttention,
    PerformerMixer,
    orthogonal_directions,
    performer_attention,
    performer_log_features,
)
from mmcastling.attention.peers.relu_linear import (
    ReLULinearAttention,
    ReLULinearMixer,
)

__all__ = [
    "EfficientAttention",
    "EfficientMixer",
    "FocusedAttention",
    "FocusedConv",
    "FocusedMixer",
    "HydraAttention",
    "HydraMixer",
    "PerformerAttention",
    "PerformerMixer",
    "ReLULinearAttention",
    "ReLULinearMixer",
    "efficient_attention",
    "focused_features",
    "hydra_attention",
    "orthogonal_directions",
    "performer_attention",
    "performer_log_features",
]
