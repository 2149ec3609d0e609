"""Adaptive pooling that every format can express, for maps of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AnySizeAdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for maps of any size.

    ONNX has no operator for it unless the size is known at export. Row ``i`` averages
    the rows from ``floor(i H / out)`` up to ``ceil((i + 1) H / out)``.
    """

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        if isinstance(output_size, int):
            output_size = (output_size, output_size)
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """From ``(B, C, H, W)`` to ``(B, C, *output_size)``."""
        height, width = self.output_size
        rows, columns = _bins(x, 2, height), _bins(x, 3, width)
        return rows @ x @ columns.transpose(0, 1)


def _bins(x: Tensor, axis: int, count: int) -> Tensor:
    length = x.shape[axis]
    cells = torch.arange(length, device=x.device)
    bins = torch.arange(count, device=x.device)[:, None]
    inside = (cells >= bins * length // count) & (
        cells < ((bins + 1) * length + count - 1) // count
    )
    weights = inside.to(x.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def replace_pools(module: nn.Module) -> None:
    """Put :class:`AnySizeAdaptivePool` in place of what ONNX cannot express."""
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size not in (
            1,
            (1, 1),
        ):
            setattr(module, name, AnySizeAdaptivePool(child.output_size))
        else:
            replace_pools(child)
