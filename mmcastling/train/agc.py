"""Adaptive gradient clipping: no step may move a weight by much of its size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from torch import Tensor

from mmcastling.errors import OptionError
from mmcastling.registry import OPTIM_WRAPPERS


def clip_to_weights(
    parameters: Iterable[Tensor], clip_factor: float, eps: float = 1e-3
) -> None:
    """Clip gradients to a fraction of their weights' norms, row by row, in place.

    From "High-Performance Large-Scale Image Recognition Without Normalization" (Brock
    et al. 2021), equation 3. A row is what one output channel of a matrix or kernel is
    computed with; a vector is one row.
    ``clip_factor`` is the largest norm of a row's gradient in units of the row's norm,
    which counts as at least ``eps``.
    """
    for weight in parameters:
        with torch.no_grad():
            largest = _row_norm(weight).clamp(min=eps) * clip_factor
            norm = _row_norm(weight.grad).clamp(min=1e-6)
            weight.grad.mul_((largest / norm).clamp(max=1.0))


def _row_norm(x: Tensor) -> Tensor:
    dims = tuple(range(1, x.ndim)) or None
    return torch.linalg.vector_norm(x, dim=dims, keepdim=x.ndim > 1)


@OPTIM_WRAPPERS.register_module()
class AGCOptimWrapper(OptimWrapper):
    """MMEngine's ``OptimWrapper`` with adaptive gradient clipping, as LeViT trains.

    Args:
        clip_factor: Largest norm of a row's gradient in units of the row's norm.
            Defaults to 0.01.
        **kwargs: Arguments of MMEngine's ``OptimWrapper`` but ``clip_grad``.

    Raises:
        ValueError: If the factor is not positive or ``clip_grad`` is given too.
    """

    def __init__(self, clip_factor: float = 0.01, **kwargs: Any) -> None:
        if not clip_factor > 0.0:
            raise OptionError(f"clip_factor={clip_factor!r} must be above 0")
        if kwargs.get("clip_grad") is not None:
            raise OptionError(
                f"clip_grad={kwargs['clip_grad']!r} beside adaptive clipping: use "
                "OptimWrapper for the one, clip_factor for the other"
            )
        super().__init__(**kwargs)
        self.clip_grad_kwargs = dict(clip_factor=clip_factor)
        self.clip_func = clip_to_weights
