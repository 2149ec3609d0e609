"""Training hooks, registered in MMEngine's root registry and in ours."""

from mmcastling.hooks.mask_decay_hook import MaskDecayHook

__all__ = ["MaskDecayHook"]
