"""LeViT's blocks on a grid of any size: castled, and with the original attention.

``N`` tokens fill a grid ``(H, W)`` row by row. Every attention takes tokens
``(B, N, C)`` and their grid; one of stride 2 keeps every second row and column, of odd
sizes the larger half.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseModule
from mmpretrain.models.backbones.levit import LinearBatchNorm, Residual
from torch import Tensor, nn

from mmcastling.attention import build_mixer
from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, merge_heads, split_heads, split_qkv
from mmcastling.models.folding import FusedSequential
from mmcastling.models.position_embedding import known_grid, note_grid


def strided_grid(grid: Grid, stride: int) -> Grid:
    """The grid of every ``stride``-th row and column; odd sizes round up."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def subsample(x: Tensor, grid: Grid, stride: int) -> Tensor:
    """Keep every ``stride``-th row and column of tokens ``(B, H * W, C)``."""
    if stride == 1:
        return x
    x = x.unflatten(1, grid)[:, ::stride, ::stride]  # (B, H', W', C)
    return x.flatten(1, 2)


class GridResidual(Residual):
    """``x + drop_path(block(x, grid))``, which keeps the grid."""

    stride = 1

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return x + self.drop_path(self.block(x, grid))


class CastlingLeViTAttention(BaseModule):
    """The attention of LeViT around a mixer that keeps the grid.

    ``qkv`` projects to three times ``inner_dims`` on the full grid, whatever the
    stride; the mixed tokens are subsampled before the activation and the projection.
    The original has narrower keys than values, logit biases and, where it subsamples,
    fewer queries than keys, none of which linear attention can have: these projections
    are those whose cost equals the published one (inferred from arithmetic).

    Args:
        inner_dims: Channels of each of q, k and v, a multiple of ``num_heads``.
        stride: 1, or 2 to subsample the output. Defaults to 1.
        attention, deploy: As of :func:`mmcastling.attention.build_mixer`.
    """

    def __init__(
        self,
        in_dims: int,
        inner_dims: int,
        out_dims: int,
        num_heads: int,
        stride: int = 1,
        attention: dict[str, Any] | None = None,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.num_heads = num_heads
        self.qkv = LinearBatchNorm(in_dims, 3 * inner_dims)
        head_dims = inner_dims // num_heads
        self.mixer = build_mixer(attention, num_heads, head_dims, deploy=deploy)
        self.proj = FusedSequential(
            nn.Hardswish(), LinearBatchNorm(inner_dims, out_dims)
        )

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Attend: ``(B, H * W, in_dims)`` to ``(B, H' * W', out_dims)``."""
        q, k, v = split_qkv(
            apply_layer(self.qkv, x), self.num_heads
        )  # each (B, h, N, d)
        y = merge_heads(self.mixer(q, k, v, grid))  # (B, N, inner)
        return self.proj(subsample(y, grid, self.stride))


class BiasedSoftmaxAttention(BaseModule):
    """The published attention of LeViT, on any grid.

    Softmax over logits with a learned bias per head and distance ``(|dy|, |dx|)``. The
    table of biases belongs to the usual grid; on another one, in a forward or when
    weights are loaded, it is resized. On the usual grid it equals mmpretrain's
    attention, whose weights load by name.

    Args:
        key_dims: Channels per head of queries and keys.
        attn_ratio: Channels per head of the values in units of ``key_dims``.
        grid: Usual grid ``(H, W)`` of the tokens that enter.
        stride: 1, or 2 for queries from every second row and column. Defaults to 1.
    """

    def __init__(
        self,
        in_dims: int,
        out_dims: int,
        key_dims: int,
        num_heads: int,
        attn_ratio: int,
        grid: Grid,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.num_heads = num_heads
        self.key_dims = key_dims
        self.value_dims = attn_ratio * key_dims
        self.grid = grid
        keys, values = num_heads * key_dims, num_heads * self.value_dims
        if stride == 1:
            self.qkv = LinearBatchNorm(in_dims, 2 * keys + values)
        else:  # entry 0 is the subsampling in mmpretrain, which has no weights
            self.kv = LinearBatchNorm(in_dims, keys + values)
            self.q = FusedSequential(nn.Identity(), LinearBatchNorm(in_dims, keys))
        self.proj = FusedSequential(nn.Hardswish(), LinearBatchNorm(values, out_dims))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, grid[0] * grid[1]))
        self._register_load_state_dict_pre_hook(self._prepare_biases)
        self._register_state_dict_hook(note_grid)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Attend: ``(B, H * W, in_dims)`` to ``(B, H' * W', out_dims)``."""
        widths = [self.key_dims, self.value_dims]
        if self.stride == 1:
            qkv = split_heads(apply_layer(self.qkv, x), self.num_heads)
            q, k, v = qkv.split([self.key_dims, *widths], dim=-1)
        else:
            kv = split_heads(apply_layer(self.kv, x), self.num_heads)
            k, v = kv.split(widths, dim=-1)
            queries = self.q(subsample(x, grid, self.stride))
            q = split_heads(queries, self.num_heads)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.bias(grid).to(q.dtype)
        )
        return self.proj(merge_heads(y))

    def bias(self, grid: Grid) -> Tensor:
        """Logit biases ``(h, H' * W', H * W)`` on a grid."""
        table = resize_table(self.attention_biases, self.grid, grid)
        table = table.unflatten(1, grid)  # (h, H, W) by |dy| and |dx|
        rows, columns = (
            torch.arange(0, size, self.stride, device=table.device)[:, None]
            - torch.arange(size, device=table.device)
            for size in grid
        )
        bias = table[:, rows.abs()[:, None, :, None], columns.abs()[None, :, None, :]]
        return bias.flatten(3).flatten(1, 2)  # from (h, H', W', H, W)

    def _prepare_biases(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        # mmpretrain stores the indices, which here follow from the grid.
        state_dict.pop(f"{prefix}attention_bias_idxs", None)
        name = f"{prefix}attention_biases"
        table = state_dict.get(name)
        if table is not None:
            grid = known_grid(table.shape[1], self.grid, local_metadata)
            if grid is not None:  # else loading it says that the shapes differ
                state_dict[name] = resize_table(table, grid, self.grid)


def resize_table(table: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Resize biases ``(h, H * W)`` by distance from one grid to another.

    Bilinear; the distance zero stays in place, and distances stretch with the image.
    """
    if grid == to:
        return table
    table = nn.functional.interpolate(
        table.unflatten(1, grid)[None], size=to, mode="bilinear", align_corners=True
    )
    return table[0].flatten(1)
