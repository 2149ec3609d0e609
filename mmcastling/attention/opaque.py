"""How our modules meet what turns a model's Python into a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from mmcastling.errors import UnavailableError


class OpaqueModule(nn.Module):
    """A module that ``torch.fx`` records as one call, whatever its Python asks.

    Torch's tracer does so for its own layers alone, and would stop at the first
    condition on a tensor. ``torch.jit.script`` compiles every line and has no place for
    such a call: it is refused.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward = _recorded_as_one(cls.forward)

    def __prepare_scriptable__(self) -> nn.Module:
        raise UnavailableError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose operators "
            "are chosen in Python by device and precision: use torch.export, "
            "torch.compile, or torch.jit.trace of the deployed model"
        )


def _recorded_as_one(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, fx.Proxy):
                path = value.tracer.path_of_module(self)
                return value.tracer.create_proxy("call_module", path, args, kwargs)
        return forward(self, *args, **kwargs)

    return wrapped
