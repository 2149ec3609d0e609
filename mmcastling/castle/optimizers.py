"""Which optimizers train a model: torch keeps no list of them."""

from __future__ import annotations

import gc
import sys
from collections import Counter

from torch import nn
from torch.optim import Optimizer


def optimizers_of(model: nn.Module) -> list[Optimizer]:
    """The optimizers that hold parameters of a model.

    Found among all objects that Python's garbage collector knows, which takes a moment:
    so only where something beside the model's modules refers to a parameter.
    """
    holders = [module._parameters for module in model.modules()]
    expected = Counter(id(p) for held in holders for p in held.values())
    # And this loop's variable, the call's argument.
    if not any(
        sys.getrefcount(p) > expected[id(p)] + 2
        for held in holders
        for p in held.values()
        if p is not None
    ):
        return []
    gc.collect()  # one that is gone may still refer to them
    return [
        found
        for found in gc.get_objects()
        # Not isinstance, which asks objects of others, some of which then warn.
        if issubclass(type(found), Optimizer)
        and any(id(p) in expected for g in found.param_groups for p in g["params"])
    ]
