"""The verbs on a whole model: find what is castled, set its mask, deploy it.

A castled module carries its own state and offers ``set_mask`` and
``switch_to_deploy``; these functions walk a model of any toolbox and ask nothing else
of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmcastling.attention import CastlingMixer, MaskThreshold
from mmcastling.attention.deploying import deploying
from mmcastling.errors import OptionError, UnavailableError

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
    """Set the masks of a model to the state that a checkpoint's ``meta`` records.

    Weights that carry the state of each mask themselves bring it back when they are
    loaded; checkpoints of before 0.2.0 have this record alone. So it comes first.

    Returns:
        Whether there are masks in the model, and a state in the checkpoint.
    """
    state = (checkpoint.get("meta") or {}).get(MASK_META_KEY)
    if state is None or not any(True for _ in castling_modules(model)):
        return False
    set_mask(model, state["threshold"], state["weight"])
    return True


def copy_masks(source: nn.Module, target: nn.Module) -> None:
    """Give the masks of a copy the state of those that it is a copy of."""
    modules = (castling_modules(model) for model in (source, target))
    for (_, module), (_, other) in zip(*modules, strict=False):
        if (mask := getattr(module, "branch", None)) is not None:
            other.set_mask(mask.threshold, mask.weight, mask.penalty)


def switch_to_deploy(
    model: Model,
    inplace: bool = False,
    example: Any = None,
    tolerance: float = 1e-5,
) -> Model:
    """Remove the auxiliary branch of every castling attention.

    Calls ``switch_to_deploy()`` of each module that offers it, outermost first, so that
    a backbone can fold across its own blocks. Idempotent. On a model whose masks have
    fully decayed the output does not change; a branch that is on, and what cannot be
    folded (because it is wrapped, hooked or pruned), is named in the log.

    Args:
        model: Any module: a block, a backbone, a classifier, detector or segmentor.
        inplace: Change the model itself rather than a copy. Defaults to False.
        example: Input for one forward pass in evaluation before and after, whose
            outputs must be equal: a tensor, a tuple of arguments, or a dict of them by
            name. The model itself is not changed if they are not. Defaults to None
            (nothing is compared).
        tolerance: Largest difference that counts as equal, relative to the largest
            output or 1. Defaults to 1e-5, the rounding of float32.

    Returns:
        The deployed model.

    Raises:
        UnavailableError: If the outputs for ``example`` differ or are not finite.
    """
    if not inplace or example is not None:
        deployed = _deploy(_copy(model))
        if example is not None:
            _check_same(model, deployed, example, tolerance)
        if not inplace:
            return deployed
    return _deploy(model)


def _copy(model: Model) -> Model:
    # torch copies no tensor that has been computed, as pruning and the older weight
    # norms keep them: before each forward pass they are computed anew.
    computed = [
        value
        for module in model.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(model, {id(x): x.detach().clone() for x in computed})


def _deploy(model: Model) -> Model:
    with deploying(model):
        for module in list(model.modules()):
            switch = getattr(module, "switch_to_deploy", None)
            if callable(switch):
                switch()
    return model


def _check_same(
    model: nn.Module, deployed: nn.Module, example: Any, tolerance: float
) -> None:
    before, after = _outputs(model, example), _outputs(deployed, example)
    if not before:
        raise OptionError(f"{type(model).__name__} returns no tensors for the example")
    pairs = zip(before, after, strict=True)
    difference = _largest(a.double() - b.double() for a, b in pairs)
    allowed = tolerance * max(1.0, _largest(before))
    if not difference <= allowed:  # not a number, perhaps
        raise UnavailableError(
            f"deploying {type(model).__name__} changes its output by {difference:.3g}, "
            f"where {allowed:.3g} is allowed: train until the masks are off, and see "
            "the log for what could not be folded"
        )


def _largest(tensors: Iterable[Tensor]) -> float:
    # Python's max() would pass over a NaN.
    return torch.stack([x.double().abs().max().cpu() for x in tensors]).max().item()


@torch.no_grad()
def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        if isinstance(example, dict):
            outputs = model(**example)
        else:
            outputs = model(*example if isinstance(example, tuple) else (example,))
    finally:
        for module, training in modes:
            module.training = training
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.numel()]
