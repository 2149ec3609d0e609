"""How mmcv calls an op, and in which number format the stand-in computes it."""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def widen(tensor: Tensor) -> Tensor:
    """Return ``tensor`` itself, or in float32 if it is float16 or bfloat16.

    torchvision's CPU kernels know no half formats, its CUDA kernels no bfloat16, and
    box coordinates of several hundred pixels do not fit in either.
    """
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


KERNELS: dict[str, Callable[..., Any]] = {}
"""Ops by name; parameters are named and ordered as ``mmcv._ext`` has them."""


def register_op(names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let mmcv call an op that is written as a function of one namespace.

    ``names`` are the op's parameters in ``mmcv._ext``, in their order, in one text.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature(
        [inspect.Parameter(name, kind) for name in names.split()]
    )

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def op(*args: Any, **kwargs: Any) -> Any:
            return function(
                SimpleNamespace(**signature.bind(*args, **kwargs).arguments)
            )

        op.__signature__ = signature
        KERNELS[function.__name__] = op
        return op

    return register
