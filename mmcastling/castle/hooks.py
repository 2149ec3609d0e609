"""Hooks on what castling replaces: kept where there is a place for them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mmcastling.castle.adapter_registry import CannotCastle

# The dicts that hold a module's hooks. Handles that remove a hook refer to them.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let the hooks of an attention act on what takes its place.

    Their handles go on to remove them.
    """
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook


def lost_hooks(old: nn.Module, new: nn.Module) -> list[str]:
    """Names of modules with hooks, inside an attention, that are no longer there."""
    kept = {old, *new.modules()}
    return [
        name
        for name, module in old.named_modules()
        if module not in kept and any(getattr(module, hooks) for hooks in _HOOKS)
    ]


def drop_on_load(model: nn.Module, names: Iterable[str]) -> None:
    """Let weights of the original load: without those that castling has dropped.

    They go before hooks of the model's own see them, which may look for their places.
    """
    hook = partial(_drop, tuple(names))
    handle = model._register_load_state_dict_pre_hook(hook)
    model._load_state_dict_pre_hooks.move_to_end(handle.id, last=False)


def _drop(
    names: tuple[str, ...], state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for name in names:
        state_dict.pop(f"{prefix}{name}", None)


def check_own_weights(attention: nn.Module) -> None:
    """Raise CannotCastle where the attention is not what its class says.

    Its own weights may be computed from others; a weight of another layer is computed
    by that layer, which is kept. And its forward may have been replaced.
    """
    if "forward" in vars(attention):
        raise CannotCastle(
            "its forward has been replaced, which castling would undo: castle first"
        )
    hooks = attention._forward_pre_hooks.values()
    if parametrize.is_parametrized(attention) or any(
        isinstance(hook, (BasePruningMethod, SpectralNorm, WeightNorm))
        for hook in hooks
    ):
        raise CannotCastle(
            "weights of its own are pruned or parametrized: make that permanent first "
            "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations)"
        )
