"""Optimizer settings for fine-tuning vision transformers."""

from mmcastling.optim.layer_decay import (
    LayerDecayOptimWrapperConstructor,
    find_layered_backbones,
    layer_scale,
)

__all__ = [
    "LayerDecayOptimWrapperConstructor",
    "find_layered_backbones",
    "layer_scale",
]
