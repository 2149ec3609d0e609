"""Training hooks, registered in MMEngine's root registry and in ours."""

from mmcastling.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from mmcastling.hooks.exact_resume_hook import ExactResumeHook
from mmcastling.hooks.mask_decay_hook import MaskDecayHook

__all__ = ["AtomicCheckpointHook", "ExactResumeHook", "MaskDecayHook"]
