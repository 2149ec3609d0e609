"""Castle a model: swap the softmax attentions of any module for castling ones."""

from mmcastling.castle import adapters  # noqa: F401, registers them
from mmcastling.castle.adapter_registry import CannotCastle, register_adapter
from mmcastling.castle.adapters.hugging_face import castled_from_pretrained
from mmcastling.castle.castled_attention import (
    RECOMMENDED,
    WITHOUT_GRID,
    CastledAttention,
    MixerBuilder,
    recommended_options,
)
from mmcastling.castle.report import Castled, CastleReport
from mmcastling.castle.swap import castle

__all__ = [
    "RECOMMENDED",
    "WITHOUT_GRID",
    "CannotCastle",
    "CastleReport",
    "Castled",
    "CastledAttention",
    "MixerBuilder",
    "castle",
    "castled_from_pretrained",
    "recommended_options",
    "register_adapter",
]
