"""Optimizer settings: layer-wise decay for fine-tuning, precision on any device."""

from mmcastling.optim.agc import AGCOptimWrapper
from mmcastling.optim.amp import DeviceAmpOptimWrapper
from mmcastling.optim.layer_decay import (
    LayerDecayOptimWrapperConstructor,
    find_layered_backbones,
    layer_scale,
)
from mmcastling.optim.sharded import ResumableFSDPStrategy, ShardedOptimWrapper

__all__ = [
    "AGCOptimWrapper",
    "DeviceAmpOptimWrapper",
    "LayerDecayOptimWrapperConstructor",
    "ResumableFSDPStrategy",
    "ShardedOptimWrapper",
    "find_layered_backbones",
    "layer_scale",
]
