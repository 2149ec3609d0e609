"""The depthwise convolutions on the values, the part of the residual kept at inference.

``'token'`` is the paper's, along the line of tokens; ``'grid'`` is ours for dense
tasks, an ordinary depthwise convolution on the grid of tokens.
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

    What ``nn.Conv2d`` computes of ``(B, h, N, e)``, and with its arguments, but without
    a copy of tokens that are the outer axis in memory: one kernel per head, shared by
    the head's channels; the class token is part of the line.
    """

    def forward(self, v: Tensor) -> Tensor:
        """Convolve values ``(B, h, N, e)`` over ``N``."""
        heads, tokens, channels = v.shape[1:]
        if not self.in_channels == self.out_channels == self.groups:
            return super().forward(v)  # as part of a low-rank adapter
        weight = self.weight.expand(-1, channels, -1, -1)  # (h, e, kernel_size, 1)
        convolve = functools.partial(
            nn.functional.conv2d,
            weight=weight.reshape(-1, 1, *self.kernel_size),
            padding=self.padding,
            groups=heads * channels,
        )
        x, _ = on_grid(convolve, merge_heads(v), (tokens, 1))
        return split_heads(x, heads)


def token_conv(num_heads: int, kernel_size: int = 9) -> TokenConv:
    """A :class:`TokenConv` of an odd number of tokens, 9 as released, without bias.

    It has ``kernel_size * num_heads`` parameters, whatever the channels of a head.
    """
    _check_odd(kernel_size)
    size, padding = (kernel_size, 1), (kernel_size // 2, 0)
    return TokenConv(
        num_heads, num_heads, size, padding=padding, groups=num_heads, bias=False
    )


def grid_conv(channels: int, kernel_size: int = 3) -> nn.Conv2d:
    """A depthwise convolution on maps, whose odd ``kernel_size`` keeps their size."""
    _check_odd(kernel_size)
    padding = kernel_size // 2
    return nn.Conv2d(
        channels, channels, kernel_size, padding=padding, groups=channels, bias=False
    )


def convolve_on_grid(conv: nn.Module, v: Tensor, grid: Grid | None) -> Tensor:
    """Apply a layer of maps to values ``(B, h, N, e)``, as maps of ``h * e`` channels.

    Their last ``H * W`` tokens fill ``grid``. Tokens that lead it (a class token) lie
    outside and receive zero.

    Raises:
        ValueError: If ``grid`` is missing or holds more than ``N`` tokens.
    """
    heads, tokens = v.shape[1:3]
    if grid is None:
        raise OptionError(
            f"a convolution on the grid got {tokens} tokens without their grid: pass "
            "grid=(H, W), or use local_conv='token', which needs none"
        )
    extra = count_extra(tokens, grid)
    x, _ = on_grid(conv, merge_heads(v)[:, extra:], grid)
    x = nn.functional.pad(x, (0, 0, extra, 0)) if extra else x
    return split_heads(x, heads)


def count_extra(tokens: int, grid: Grid) -> int:
    """How many tokens lead a grid; ValueError if it holds more than there are."""
    height, width = grid
    extra = tokens - height * width
    if extra < 0:
        raise OptionError(
            f"grid {grid} holds {height * width} tokens but there are only {tokens}"
        )
    return extra


def _check_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise OptionError(
            f"kernel_size {kernel_size!r} must be a positive odd number, so that the "
            "convolution keeps the number of tokens"
        )


def build_local_conv(
    spec: str | dict[str, Any] | None, num_heads: int, head_dims: int
) -> nn.Module | None:
    """Build what a ``local_conv`` option names; ValueError if that is not known."""
    if spec is None:
        return None
    options = dict(spec) if isinstance(spec, dict) else {"type": spec}
    kind = options.pop("type", None)
    init = options.pop("init", None)
    if kind not in ("grid", "token") or init not in (None, "zero"):
        raise OptionError(
            f"local_conv {spec!r} is not known: choose 'grid', 'token', "
            "dict(type=..., kernel_size=..., init='zero'), or None"
        )
    if kind == "grid":
        conv = grid_conv(num_heads * head_dims, **options)
    else:
        conv = token_conv(num_heads, **options)
    if init == "zero":
        nn.init.zeros_(conv.weight)
    return conv
