"""What training adds to MMEngine's: the decay of the masks, and optimizer settings."""

from mmcastling.compat.atomic_checkpoint_hook import AtomicCheckpointHook
from mmcastling.compat.exact_resume_hook import ExactResumeHook
from mmcastling.compat.sharded import ResumableFSDPStrategy, ShardedOptimWrapper
from mmcastling.train.agc import AGCOptimWrapper
from mmcastling.train.amp import DeviceAmpOptimWrapper
from mmcastling.train.attention_teacher_hook import AttentionTeacherHook
from mmcastling.train.layer_decay import (
    LayerDecayOptimWrapperConstructor,
    find_layered_backbones,
    layer_scale,
)
from mmcastling.train.mask_decay_hook import MaskDecayHook

__all__ = [
    "AGCOptimWrapper",
    "AtomicCheckpointHook",
    "AttentionTeacherHook",
    "DeviceAmpOptimWrapper",
    "ExactResumeHook",
    "LayerDecayOptimWrapperConstructor",
    "MaskDecayHook",
    "ResumableFSDPStrategy",
    "ShardedOptimWrapper",
    "find_layered_backbones",
    "layer_scale",
]
