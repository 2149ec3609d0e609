"""What mixes tokens: the part of an attention between its projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmcastling.attention.functional import l2_normalize
from mmcastling.attention.local_conv import (
    Grid,
    TokenConv,
    build_local_conv,
    convolve_on_grid,
)
from mmcastling.attention.opaque import OpaqueModule
from mmcastling.errors import OptionError

Bias = Callable[[], Tensor]
"""Computes what is added to the logits; it broadcasts to ``(B, h, N, N)``."""


def check_switch(name: str, value: Any) -> None:
    """OptionError unless an option that is on or off is True or False."""
    if not isinstance(value, bool):  # a text such as "false" would be on
        raise OptionError(f"{name} {value!r} must be True or False")


class TokenMixer(OpaqueModule):
    """The frame of every mixer: mix, normalise, add ``local_conv(v)``.

    Subclasses define :meth:`mix`. Queries, keys and values that are views of
    ``(B, N, h, e)`` in memory, as projections leave them, are mixed without copies into
    the order of the heads.

    Args:
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values, ``e``.
        local_conv: Depthwise convolution added to the mixed values: ``'token'`` (the
            paper's), ``'grid'`` (2-D), a dict with ``type``, ``kernel_size`` and
            ``init='zero'`` (no effect at first), or None. Defaults to None.
        norm_output: Whether each head's output vector is scaled to length 1 before
            ``local_conv`` is added, as the released block does. Defaults to False.
        key_dims: Channels per head of queries and keys, which matter to a mixer with
            weights of that size. Defaults to None (``head_dims``).
    """

    uses_grid: bool
    """Whether the mixer must be given the grid of the tokens."""

    deploy = False  # only a mixer with something to remove has a deployed form
    uses_bias = False  # only softmax has logits that one could be added to

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        local_conv: str | dict[str, Any] | None = None,
        norm_output: bool = False,
        key_dims: int | None = None,
    ) -> None:
        super().__init__()
        check_switch("norm_output", norm_output)
        self.num_heads = num_heads
        self.head_dims = head_dims
        self.key_dims = key_dims or head_dims
        self.norm_output = norm_output
        self.local_conv = build_local_conv(local_conv, num_heads, head_dims)
        # Asked now, before something may wrap or replace the convolution.
        line = isinstance(self.local_conv, TokenConv)
        self._conv_on_grid = self.local_conv is not None and not line
        self.uses_grid = self._conv_on_grid

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix values over tokens: ``(B, h, N, d)`` twice and ``(B, h, N, e)`` to it.

        One that uses a bias takes it as a fourth argument.
        """
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid | None = None,
        bias: Bias | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            q: Queries ``(B, h, N, d)``.
            k: Keys ``(B, h, N, d)``.
            v: Values ``(B, h, N, e)``; the last ``H * W`` of the ``N`` tokens fill
                ``grid`` row by row, tokens before them lie outside it.
            grid: ``(H, W)`` of the tokens; needed where ``uses_grid`` says so.
            bias: Computes what is added to the logits. It is not called by a mixer that
                has no logits, see ``uses_bias``.

        Returns:
            ``(B, h, N, e)`` in the dtype of ``v``.
        """
        local = self.convolve(v, grid)
        logits_bias = [bias()] if bias is not None and self.uses_bias else []
        mixed = self.mix(q, k, v, *logits_bias)
        return self.normalize_and_add(mixed, local, v.dtype)

    def convolve(self, v: Tensor, grid: Grid | None) -> Tensor | None:
        """``local_conv`` of ``(B, h, N, e)``, or None without a convolution."""
        if self.local_conv is None:
            return None
        if self._conv_on_grid:
            return convolve_on_grid(self.local_conv, v, grid)
        return self.local_conv(v)

    def normalize_and_add(
        self, y: Tensor, local: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Normalise mixed values, where ``norm_output`` says so, and add ``local``."""
        if self.norm_output:
            return l2_normalize(y, residual=local).to(dtype)
        y = y.to(dtype)
        return y if local is None else y + local

    def switch_to_deploy(self) -> None:
        """Become what inference needs, with the same output. Idempotent."""
