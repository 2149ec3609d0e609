"""Of which grid a table of positions is, where their number leaves it open."""

import pytest
import torch
from mmengine.runner import save_checkpoint
from torch.testing import assert_close

from mmcastling.checkpoint import CheckpointError, load_checkpoint
from mmcastling.models import CastlingLeViT, CastlingViT
from mmcastling.models.levit_blocks import resize_table
from mmcastling.models.position_embedding import (
    fit_position_embedding,
    grid_of_positions,
)

SOFTMAX = dict(type="softmax")


def vit(height, width):
    return CastlingViT("nano", img_size=(16 * height, 16 * width))


def learnt(height, width, dims=48):
    """A table as training makes them: rows and columns each have a direction."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(height, 1, dims, generator=generator).cumsum(0)
    columns = torch.randn(1, width, dims, generator=generator).cumsum(1)
    return (rows + columns).reshape(1, height * width, dims)


@pytest.mark.parametrize(
    "grid", [(4, 9), (9, 4), (3, 12), (6, 6), (4, 8), (10, 8), (14, 14)]
)
@pytest.mark.parametrize("held", [0, 1])
def test_a_learnt_table_shows_its_grid(grid, held):
    table = torch.cat([torch.zeros(1, held, 48), learnt(*grid)], dim=1)
    assert grid_of_positions(table, held) == (grid, held)
    # Also where the model's own has as many positions.
    assert grid_of_positions(table, held, (grid[1], grid[0]))[0] == grid


@pytest.mark.parametrize("dims", [8, 48])
def test_a_random_table_is_of_the_expected_grid_or_of_a_square(dims):
    for seed in range(20):
        torch.manual_seed(seed)
        table = torch.randn(1, 36, dims)
        assert grid_of_positions(table, 0) == ((6, 6), 0)
        assert grid_of_positions(table, 0, (4, 9)) == ((4, 9), 0)
        with pytest.raises(CheckpointError, match="is no square"):
            grid_of_positions(torch.randn(1, 35, 48), 0)


def test_what_is_recorded_decides(tmp_path):
    source = vit(4, 9)  # not trained, so the table itself shows nothing
    torch.nn.init.normal_(source.pos_embed)
    save_checkpoint(dict(state_dict=source.state_dict()), str(tmp_path / "a.pth"))
    for state in (
        source.state_dict(),
        load_checkpoint(tmp_path / "a.pth")["state_dict"],
    ):
        target = vit(6, 6)  # as many positions
        target.load_state_dict(state)
        expected, note = fit_position_embedding(
            source.pos_embed, 1, (6, 6), 1, local_metadata=dict(grid=(4, 9))
        )
        assert note == "resized from 4x9 to 6x6"
        assert_close(target.pos_embed, expected)
        again = vit(4, 9)
        again.load_state_dict(state)
        assert_close(again.pos_embed, source.pos_embed)


def test_so_it_does_for_the_biases_of_levit():
    sizes = dict(arch="128s", attention=SOFTMAX)
    source = CastlingLeViT(img_size=(64, 144), **sizes)
    target = CastlingLeViT(img_size=96, **sizes)
    name = "stages.0.0.block.attention_biases"
    table = torch.nn.init.normal_(source.get_parameter(name).data)
    target.load_state_dict(source.state_dict())
    assert_close(target.get_parameter(name), resize_table(table, (4, 9), (6, 6)))
