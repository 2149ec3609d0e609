"""The depthwise convolutions on the values, the part of the residual kept at inference.

``TokenConv`` is the paper's, along the line of tokens; ``GridConv`` is ours for dense
tasks, on the grid of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmcastling.errors import OptionError

Grid = tuple[int, int]


def merge_heads(y: Tensor) -> Tensor:
    """``(B, h, N, e)`` to ``(B, N, h * e)``, a view where tokens are outermost."""
    return y.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """``(B, N, h * e)`` to ``(B, h, N, e)``, a view."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def split_qkv(x: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, N, 3 * h * d)`` to queries, keys and values ``(B, h, N, d)``, views."""
    x = x.unflatten(2, (3, num_heads, -1))
    q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def on_grid(
    operation: Callable[[Tensor], Tensor], x: Tensor, grid: Grid
) -> tuple[Tensor, Grid]:
    """Apply what works on maps to tokens, channels last in memory and without a copy.

    ``(B, H * W, C)`` to ``(B, H' * W', C')`` and ``(H', W')``.
    """
    x = operation(x.unflatten(1, grid).permute(0, 3, 1, 2))
    return x.permute(0, 2, 3, 1).flatten(1, 2), (x.shape[2], x.shape[3])


class TokenConv(nn.Conv2d):
    """Depthwise convolution along the flattened token axis, as released.

    One kernel per head, shared by the head's channels; the class token is part of the
    line. Without bias: ``kernel_size * num_heads`` parameters, whatever ``head_dims``.
    The released ``kernel_size``, an odd number of tokens, is 9.
    """

    def __init__(self, num_heads: int, head_dims: int, kernel_size: int = 9) -> None:
        _check_odd(kernel_size)
        super().__init__(
            num_heads,
            num_heads,
            (kernel_size, 1),
            padding=(kernel_size // 2, 0),
            groups=num_heads,
            bias=False,
        )

    def forward(self, v: Tensor, grid: Grid | None = None) -> Tensor:
        """Convolve values ``(B, h, N, e)`` over ``N``; ``grid`` is not needed."""
        heads, tokens, channels = v.shape[1:]
        weight = self.weight.expand(-1, channels, -1, -1)  # (h, e, kernel_size, 1)
        convolve = functools.partial(
            nn.functional.conv2d,
            weight=weight.reshape(-1, 1, *self.kernel_size),
            padding=self.padding,
            groups=heads * channels,
        )
        x, _ = on_grid(convolve, merge_heads(v), (tokens, 1))
        return split_heads(x, heads)


class GridConv(nn.Conv2d):
    """Depthwise convolution on the ``(H, W)`` grid of tokens, one kernel per channel.

    Tokens that lead the grid (a class token) lie outside it and receive zero. The
    kernel is a square whose side ``kernel_size`` is odd.
    """

    def __init__(self, num_heads: int, head_dims: int, kernel_size: int = 3) -> None:
        _check_odd(kernel_size)
        channels = num_heads * head_dims
        super().__init__(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
            bias=False,
        )

    def forward(self, v: Tensor, grid: Grid | None = None) -> Tensor:
        """Convolve values ``(B, h, N, e)`` whose last ``H * W`` tokens fill ``grid``.

        Raises:
            ValueError: If ``grid`` is missing or holds more than ``N`` tokens.
        """
        heads, tokens = v.shape[1:3]
        if grid is None:
            raise OptionError(
                f"GridConv got {tokens} tokens without their grid: pass grid=(H, W), "
                "or use local_conv='token', which needs none"
            )
        height, width = grid
        extra = tokens - height * width
        if extra < 0:
            raise OptionError(
                f"grid {grid} holds {height * width} tokens but there are only {tokens}"
            )
        x, _ = on_grid(super().forward, merge_heads(v)[:, extra:], grid)
        x = nn.functional.pad(x, (0, 0, extra, 0)) if extra else x
        return split_heads(x, heads)


def _check_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise OptionError(
            f"kernel_size {kernel_size!r} must be a positive odd number, so that the "
            "convolution keeps the number of tokens"
        )


LOCAL_CONVS: dict[str, type[nn.Module]] = {"token": TokenConv, "grid": GridConv}


def build_local_conv(
    spec: str | dict[str, Any] | None, num_heads: int, head_dims: int
) -> nn.Module | None:
    """Build what a ``local_conv`` option names; ValueError if that is not known."""
    if spec is None:
        return None
    options = dict(spec) if isinstance(spec, dict) else {"type": spec}
    kind = options.pop("type", None)
    init = options.pop("init", None)
    if kind not in LOCAL_CONVS or init not in (None, "zero"):
        raise OptionError(
            f"local_conv {spec!r} is not known: choose one of {sorted(LOCAL_CONVS)}, "
            "dict(type=..., kernel_size=..., init='zero'), or None"
        )
    conv = LOCAL_CONVS[kind](num_heads, head_dims, **options)
    if init == "zero":
        nn.init.zeros_(conv.weight)
    return conv
