"""Full precision inside a function, whatever the precision around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast leaves operations on a device as they are."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    ):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # it is off, or there is none, as on the meta device


def in_full_precision(function: Function) -> Function:
    """Run on float32 copies of half-precision tensors, untouched by autocast.

    A tensor that may be missing is None.
    """

    @functools.wraps(function)
    def wrapped(*tensors: Tensor | None, **options: Any) -> Any:
        half = (torch.float16, torch.bfloat16)
        tensors = tuple(
            t.float() if t is not None and t.dtype in half else t for t in tensors
        )
        with without_autocast(tensors[0].device):
            return function(*tensors, **options)

    return wrapped  # type: ignore[return-value]
