"""What deployment may fold into a layer, and what it says about the rest.

A factor goes into a layer only where the layer is provably its own: exactly of a known
class, its weight a parameter that nothing computes, and without hooks. The folded
layer is a new one, so that whatever shares the old one or its weight keeps it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from mmcastling.attention.recording import is_watched

logger = logging.getLogger("mmcastling")

_NOTES: ContextVar[list[tuple[nn.Module, str]] | None] = ContextVar(
    "notes", default=None
)


@contextmanager
def deploying(model: nn.Module) -> Iterator[None]:
    """Collect what is noted while a model is deployed, and log it with its names."""
    if _NOTES.get() is not None:  # the outermost knows the whole names
        yield
        return
    names = {id(module): name for name, module in model.named_modules()}
    notes: list[tuple[nn.Module, str]] = []
    token = _NOTES.set(notes)
    try:
        yield
    finally:
        _NOTES.reset(token)
    found: dict[str, dict[str, None]] = {}
    for module, text in notes:
        name = names.get(id(module)) or type(module).__name__
        found.setdefault(text, {})[name] = None  # a set that keeps its order
    for text, where in ((text, list(names)) for text, names in found.items()):
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        logger.warning("deployment: %s%s: %s", ", ".join(where[:3]), more, text)


def note(module: nn.Module, text: str) -> None:
    """Say something of a module in the log, under its name inside :func:`deploying`."""
    notes = _NOTES.get()
    if notes is None:
        logger.warning("deployment: %s: %s", type(module).__name__, text)
    else:
        notes.append((module, text))


def why_not_plain(module: nn.Module, *kinds: type[nn.Module]) -> str | None:
    """Why a module may compute other than exactly one of ``kinds``, or None."""
    if type(module) not in kinds:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"{kind} is not exactly a {kinds[0].__name__}"
    if is_watched(module):
        return f"the {kinds[0].__name__} has hooks or a forward of its own"
    for name in ("weight", "bias"):
        own = type(module._parameters.get(name)) is nn.Parameter
        if getattr(module, name, None) is not None and not own:
            return f"the {name} of the {kinds[0].__name__} is no parameter"
    return None


def without_effect(module: nn.Module, *kinds: type[nn.Module]) -> nn.Module:
    """``nn.Identity()`` in the place of a dropout of ``kinds``, else the module."""
    if type(module) in kinds and not is_watched(module):
        return nn.Identity()
    return module


@torch.no_grad()
def fold_layer_scale(
    linear: nn.Module,
    scale: nn.Module,
    kinds: Sequence[type[nn.Module]],
    between: Sequence[nn.Module] = (),
) -> tuple[nn.Module, nn.Module]:
    """Multiply a layer by the learned factors per channel behind it.

    Args:
        linear: The layer, which stays as it is.
        scale: A module of ``kinds`` with a ``weight`` of factors, or ``nn.Identity``.
        kinds: Classes that multiply the last axis by their ``weight``.
        between: What stands between the two, without effect in inference.

    Returns:
        The layer with the factors in it and ``nn.Identity()``; or, with a note in the
        log, both as they are where the result might be another.
    """
    if type(scale) is nn.Identity:
        return linear, scale
    reasons = [
        why_not_plain(linear, nn.Linear),
        why_not_plain(scale, *kinds),
        *(why_not_plain(module, nn.Identity, nn.Dropout) for module in between),
    ]
    if getattr(scale, "data_format", "channels_last") != "channels_last":
        reasons.append("its factors are for another axis")
    for reason in filter(None, reasons):
        note(scale, f"not folded into the layer before it: {reason}")
        return linear, scale
    folded = copy.deepcopy(linear)
    folded.weight.mul_(scale.weight[:, None])
    if folded.bias is not None:
        folded.bias.mul_(scale.weight)
    return folded, nn.Identity()
