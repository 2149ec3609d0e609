"""Tables of positions, brought to another image size or number of class tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn

from mmcastling.attention.local_conv import Grid
from mmcastling.errors import CheckpointError

_GRID = "grid"  # in a state dict's metadata
# How small the step from a position to the one below is, as a share of the steps beside
# it. In random tables it is 1, in learnt ones about 1/2.
_LIKELY, _SURE = 0.9, 0.7


def note_grid(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict
) -> None:
    """Record the grid of a module's table in a state dict's metadata, as its hook."""
    grid = getattr(module, "patch_resolution", None) or module.grid
    local_metadata[_GRID] = tuple(grid)


def known_grid(
    count: int, expected: Grid | None, local_metadata: Mapping[str, Any]
) -> Grid | None:
    """The grid ``(H, W)`` of so many positions, or None where nothing tells it.

    The one that was recorded; else the expected one or a square, if it may be that.
    """
    side = math.isqrt(max(0, count))
    options = (local_metadata.get(_GRID), expected, (side, side))
    fitting = (tuple(grid) for grid in options if grid and math.prod(grid) == count)
    return next(fitting, None) if count > 0 else None


def _measured_grid(table: Tensor, guess: Grid | None) -> Grid | None:
    """The grid that a table ``(N, C)`` shows, or else the one that was guessed.

    In a learnt table a position resembles the one below it more than those beside that.
    """
    count = 0 if table.is_meta else table.shape[0]
    widths = [width for width in range(2, count // 2 + 1) if count % width == 0]
    steps = {
        step: (table[step:] - table[:-step]).float().square().mean().item()
        for step in {width + near for width in widths for near in (-1, 0, 1)}
    }
    shares = {}
    for width in widths:
        beside = min(steps[width - 1], steps[width + 1])
        shares[width] = steps[width] / beside if beside else 1.0
    if guess is not None and shares.get(guess[1], 1.0) < _LIKELY:
        return guess
    width = min(shares, key=shares.get, default=0)
    return (count // width, width) if width and shares[width] < _SURE else guess


def grid_of_positions(
    table: Tensor,
    held: int,
    expected: Grid | None = None,
    local_metadata: Mapping[str, Any] | None = None,
) -> tuple[Grid, int]:
    """The grid of a position embedding, and how many positions belong to class tokens.

    Args:
        table: Positions ``(1, N, C)``, those of class tokens first.
        held: Class tokens that came with it. It may hold positions for more of them, or
            for none, as timm's can.
        expected: The grid ``(H, W)`` if it has the right number of patches. Defaults to
            None.
        local_metadata: What the state dict records of the module.

    Raises:
        CheckpointError: If there is no such grid.
    """
    if table.ndim != 3:
        raise CheckpointError(
            f"the position embedding is {tuple(table.shape)}, expected (1, tokens, "
            "channels)"
        )
    recorded = local_metadata or {}
    for extra in dict.fromkeys((held, 1, 2, 0)):
        grid = known_grid(table.shape[1] - extra, expected, recorded)
        if grid is None or grid != recorded.get(_GRID):
            grid = _measured_grid(table[0, extra:], grid)
        if grid is not None:
            return grid, extra
    raise CheckpointError(
        f"the position embedding has {table.shape[1]} positions, of which {held} "
        "belong to class tokens: the rest is no square and cannot be resized. Import "
        "such weights with the source's own --img-size H W"
    )


def fit_position_embedding(
    table: Tensor,
    held: int,
    grid: Grid,
    wanted: int,
    mode: str = "bicubic",
    local_metadata: Mapping[str, Any] | None = None,
) -> tuple[Tensor, str]:
    """Fit a position embedding to a grid and a number of class tokens.

    Missing positions of class tokens become zero; of two, that of the distillation
    token, the second, is removed first.

    Args:
        table, held, local_metadata: As in :func:`grid_of_positions`.
        grid, wanted: The grid ``(H, W)`` and number of class tokens that are wanted.
        mode: How patches are interpolated. Defaults to ``'bicubic'``.

    Returns:
        Positions ``(1, wanted + H * W, C)``, and what was done to get them.

    Raises:
        CheckpointError: If the grid of the table is not known.
    """
    own, extra = grid_of_positions(table, held, grid, local_metadata)
    if (own, extra) == (grid, wanted):
        return table, ""
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
