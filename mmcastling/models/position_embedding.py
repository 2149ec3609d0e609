"""Tables of positions, brought to another image size or number of class tokens."""

from __future__ import annotations

import math

import torch
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn

from mmcastling.attention.local_conv import Grid
from mmcastling.errors import CheckpointError


def grid_of_positions(
    table: Tensor, held: int, expected: Grid | None = None
) -> tuple[Grid, int]:
    """The grid of a position embedding, and how many positions belong to class tokens.

    Args:
        table: Positions ``(1, N, C)``, those of class tokens first.
        held: Class tokens that came with it. It may hold positions for more of them, or
            for none, as timm's can.
        expected: The grid ``(H, W)`` if it has the right number of patches. Defaults to
            None; otherwise the grid must be square.

    Raises:
        CheckpointError: If there is no such grid.
    """
    if table.ndim != 3:
        raise CheckpointError(
            f"the position embedding is {tuple(table.shape)}, expected (1, tokens, "
            "channels)"
        )
    for extra in dict.fromkeys((held, 1, 2, 0)):
        patches = table.shape[1] - extra
        if expected is not None and patches == math.prod(expected):
            return expected, extra
        side = math.isqrt(max(0, patches))
        if side and side**2 == patches:
            return (side, side), extra
    raise CheckpointError(
        f"the position embedding has {table.shape[1]} positions, of which {held} "
        "belong to class tokens: the rest is no square and cannot be resized. Import "
        "such weights with the source's own --img-size H W"
    )


def fit_position_embedding(
    table: Tensor, held: int, grid: Grid, wanted: int, mode: str = "bicubic"
) -> tuple[Tensor, str]:
    """Fit a position embedding to a grid and a number of class tokens.

    Missing positions of class tokens become zero; of two, that of the distillation
    token, the second, is removed first.

    Args:
        table, held: As in :func:`grid_of_positions`.
        grid, wanted: The grid ``(H, W)`` and number of class tokens that are wanted.
        mode: How patches are interpolated. Defaults to ``'bicubic'``.

    Returns:
        Positions ``(1, wanted + H * W, C)``, and what was done to get them.

    Raises:
        CheckpointError: If the grid of the table is not known.
    """
    own, extra = grid_of_positions(table, held, grid)
    notes = []
    if extra > wanted:
        which = "distillation" if extra == 2 and wanted == 1 else "class"
        notes.append(f"the {which} token's position removed")
    elif extra < wanted:
        notes.append("zero added for class tokens, which have no position")
    tokens = table[:, : min(extra, wanted)]
    tokens = nn.functional.pad(tokens, (0, 0, 0, wanted - tokens.shape[1]))
    table = torch.cat((tokens, table[:, extra:]), dim=1)
    if own != grid:
        table = resize_pos_embed(table, own, grid, mode, wanted)
        notes.append(f"resized from {own[0]}x{own[1]} to {grid[0]}x{grid[1]}")
    return table, ", ".join(notes)
