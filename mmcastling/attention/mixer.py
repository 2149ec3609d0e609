"""What mixes tokens: the part of an attention between its projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmcastling.attention.functional import unit_rows
from mmcastling.attention.local_conv import Grid, build_local_conv


class TokenMixer(nn.Module):
    """The frame of every mixer: mix, normalise, add ``local_conv(v)``.

    Subclasses define :meth:`mix`. Backbones that project in their own way (LeViT,
    MViTv2) hold a mixer; plain attention blocks inherit from one. Queries, keys and
    values that are views of ``(B, N, h, e)`` in memory, as projections leave them, are
    mixed without copies into the order of the heads.

    Args:
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values, ``e``.
        local_conv: Depthwise convolution added to the mixed values: ``'token'`` (the
            paper's), ``'grid'`` (2-D), a dict with ``type`` and ``kernel_size``, or
            None. Defaults to None.
        norm_output: Whether each head's output vector is scaled to length 1 before
            ``local_conv`` is added, as the released block does. Defaults to False.
    """

    deploy = False  # only a mixer with something to prune has a deployed form

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        local_conv: str | dict[str, Any] | None = None,
        norm_output: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dims = head_dims
        self.norm_output = norm_output
        self.local_conv = build_local_conv(local_conv, num_heads, head_dims)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix values over tokens: ``(B, h, N, d)`` twice and ``(B, h, N, e)`` to it."""
        raise NotImplementedError

    def mix_to_unit(
        self, q: Tensor, k: Tensor, v: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        """:meth:`mix`, each row scaled to length 1, then ``plus`` added."""
        return unit_rows(self.mix(q, k, v), plus=plus)

    def switch_to_deploy(self) -> None:
        """Become what inference needs, with the same output. Idempotent."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None = None
    ) -> Tensor:
        """Mix tokens.

        Args:
            q: Queries ``(B, h, N, d)``.
            k: Keys ``(B, h, N, d)``.
            v: Values ``(B, h, N, e)``; the last ``H * W`` of the ``N`` tokens fill
                ``grid`` row by row, tokens before them lie outside it.
            grid: ``(H, W)`` of the tokens; needed by ``local_conv='grid'`` only.

        Returns:
            ``(B, h, N, e)`` in the dtype of ``v``.
        """
        local = None if self.local_conv is None else self.local_conv(v, grid)
        if self.norm_output:
            return self.mix_to_unit(q, k, v, plus=local).to(v.dtype)
        y = self.mix(q, k, v).to(v.dtype)
        return y if local is None else y + local
