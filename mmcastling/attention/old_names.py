"""Checkpoints in which an attention's mixer was not yet a module of its own.

``attn.local_conv.weight`` is now ``attn.mixer.local_conv.weight``, and so on.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Any

from torch import Tensor

logger = logging.getLogger("mmcastling")

_MOVED = ("local_conv.weight", "local_conv.bias", "directions", "scale")
_noted: list[Any] = [None]


def with_current_names(weights: dict[str, Any], own: Container[str]) -> dict[str, Any]:
    """Give weights, or what else has their names, those that ``own`` has now."""
    names = {}
    for name in weights:
        for old in _MOVED:
            new = f"{name.removesuffix(old)}mixer.{old}"
            if name.endswith(old) and name not in own and new in own:
                names[name] = new
    return {names.get(name, name): value for name, value in weights.items()}


def rename_on_load(
    state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
) -> None:
    """Rename an attention's weights in place, as a hook before they are loaded."""
    moved = [name for name in _MOVED if f"{prefix}{name}" in state_dict]
    for name in moved:
        state_dict[f"{prefix}mixer.{name}"] = state_dict.pop(f"{prefix}{name}")
    errors = args[-1]  # one list for all modules of a load
    if moved and _noted[0] is not errors:
        _noted[0] = errors
        logger.warning(
            "the checkpoint is of an earlier release: %s%s is now %smixer.%s, and so "
            "on. Save it again to have the new names",
            *(prefix, moved[0]) * 2,
        )
