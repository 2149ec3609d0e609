"""The verbs on a whole model: find what is castled, set its mask, deploy it.

A castled module carries its own state and offers ``set_mask`` and
``switch_to_deploy``; these functions walk a model of any toolbox and ask nothing else
of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from mmcastling.attention import CastlingMixer, MaskThreshold
from mmcastling.errors import OptionError

Model = TypeVar("Model", bound=nn.Module)

MASK_META_KEY = "mask_decay"
"""Where a checkpoint's ``meta`` holds the state of the masks."""


def castling_modules(model: nn.Module) -> Iterator[tuple[str, CastlingMixer]]:
    """Yield ``(name, module)`` of every castling attention that has its branch.

    That is a :class:`~mmcastling.attention.CastlingMixer`, or whatever else offers
    ``set_mask``; a ``deploy`` that is true says that its branch is gone. Only what has
    ``branch`` and ``mask_is_on`` as a mixer has is asked for its density and state.
    """
    for name, module in model.named_modules():
        offered = callable(getattr(module, "set_mask", None))
        if offered and getattr(module, "deploy", False) is not True:
            yield name, module


def set_mask(
    model: nn.Module,
    threshold: float | str | MaskThreshold,
    weight: float = 1.0,
    penalty: float = 0.0,
) -> int:
    """Set the auxiliary branch's threshold, weight and penalty in the whole model.

    Args:
        model: Any module with castling attentions.
        threshold: A probability in [0, 1], or text such as ``'4/N'``; 1 turns the
            branch off.
        weight: Factor of the branch; 0 turns it off. Defaults to 1.
        penalty: Factor of the penalty on surviving probabilities, see
            :func:`mmcastling.attention.masked_softmax_attention`. Defaults to 0.

    Returns:
        The number of attentions that were set.

    Raises:
        ValueError: If a value is out of range, or the model has no castling attention
            with a branch.
    """
    threshold = MaskThreshold.parse(threshold)
    modules = [module for _, module in castling_modules(model)]
    if not modules:
        raise OptionError(
            f"{type(model).__name__} has no castling attention with an auxiliary "
            "branch: it was never castled, or has been deployed already"
        )
    for module in modules:
        module.set_mask(threshold, weight, penalty)
    return len(modules)


def restore_mask(model: nn.Module, checkpoint: dict[str, Any]) -> bool:
    """Set the masks of a model to the state in which a loaded checkpoint was saved.

    Returns:
        Whether there are masks in the model, and a state in the checkpoint.
    """
    state = (checkpoint.get("meta") or {}).get(MASK_META_KEY)
    if state is None or not any(True for _ in castling_modules(model)):
        return False
    set_mask(model, state["threshold"], state["weight"])
    return True


def switch_to_deploy(model: Model, inplace: bool = False) -> Model:
    """Remove the auxiliary branch of every castling attention.

    Calls ``switch_to_deploy()`` of each module that offers it, outermost first, so that
    a backbone can fold across its own blocks. Idempotent. On a model whose masks have
    fully decayed the output does not change.

    Args:
        model: Any module: a block, a backbone, a classifier, detector or segmentor.
        inplace: Change the model itself rather than a copy. Defaults to False.

    Returns:
        The deployed model.
    """
    if not inplace:
        model = copy.deepcopy(model)
    for module in list(model.modules()):
        switch = getattr(module, "switch_to_deploy", None)
        if callable(switch):
            switch()
    return model
