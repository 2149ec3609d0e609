"""Multi-scale deformable attention against its definition."""

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

LEVELS = [(3, 4), (2, 2), (1, 3)]


def slow_attention(
    value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Every query and head: interpolate at each point, weigh, add up."""
    batch, queries, heads, _, points, _ = locations.shape
    starts = [sum(h * w for h, w in levels[:i]) for i in range(len(levels))]
    rows = []
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                total = value.new_zeros(value.shape[3])
                for i, (height, width) in enumerate(levels):
                    tokens = value[b, starts[i] : starts[i] + height * width, head]
                    image = tokens.view(height, width, -1)
                    for p in range(points):
                        x, y = locations[b, q, head, i, p]
                        y, x = y * height - 0.5, x * width - 0.5
                        row = (1 - (torch.arange(height) - y).abs()).clamp(min=0)
                        column = (1 - (torch.arange(width) - x).abs()).clamp(min=0)
                        hat = row[:, None] * column
                        sample = (image * hat[:, :, None]).sum((0, 1))
                        total = total + weights[b, q, head, i, p] * sample
                rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)


def tensors(
    levels: list[tuple[int, int]],
    batch: int = 2,
    queries: int = 3,
    heads: int = 2,
    channels: int = 3,
    points: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(h * w for h, w in levels)
    value = torch.randn(
        batch, tokens, heads, channels, generator=generator, dtype=torch.float64
    )
    shape = (batch, queries, heads, len(levels), points)
    # A fifth lies outside of 0..1
    locations = (
        torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    )
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (value, locations, weights))


def attend(
    value: Tensor, levels: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """mmcv's function for accelerators, which runs on any device here."""
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    shapes = torch.tensor(levels)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    return module.MultiScaleDeformableAttnFunction.apply(
        value, shapes, starts, locations, weights, 64
    )


@pytest.mark.parametrize(
    "levels", [LEVELS, LEVELS[:1], [(1, 1)]], ids=["three", "one", "single-token"]
)
def test_attention_follows_the_definition(
    mmcv_ops: ModuleType, levels: list[tuple[int, int]]
) -> None:
    inputs = tensors(levels)
    actual = attend(inputs[0], levels, *inputs[1:])
    expected = slow_attention(inputs[0], levels, *inputs[1:])
    torch.testing.assert_close(actual, expected)
    cotangent = torch.linspace(-1, 1, expected.numel()).view_as(expected).double()
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
    )


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 5),
    levels=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3
    ),
)
def test_attention_follows_the_definition_for_any_shape(
    mmcv_ops: ModuleType, sizes: tuple[int, ...], levels: list[tuple[int, int]]
) -> None:
    value, locations, weights = (t.detach() for t in tensors(levels, *sizes))
    torch.testing.assert_close(
        attend(value, levels, locations, weights),
        slow_attention(value, levels, locations, weights),
    )


def test_levels_are_found_by_their_start_index(mmcv_ops: ModuleType) -> None:
    # Levels stored back to front: only the start index says so.
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    value, locations, weights = (t.detach() for t in tensors(LEVELS))
    parts = value.split([h * w for h, w in LEVELS], 1)
    stored = torch.cat(parts[::-1], 1)
    starts = torch.tensor([7, 3, 0])
    actual = module.MultiScaleDeformableAttnFunction.apply(
        stored, torch.tensor(LEVELS), starts, locations, weights, 64
    )
    torch.testing.assert_close(actual, attend(value, LEVELS, locations, weights))


def test_layer_is_the_same_with_and_without_the_op(
    mmcv_ops: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    torch.manual_seed(0)
    layer = mmcv_ops.MultiScaleDeformableAttention(8, 2, 3, 2, batch_first=True).eval()
    torch.nn.init.normal_(layer.attention_weights.weight)
    query, value = torch.randn(2, 5, 8), torch.randn(2, 19, 8)
    arguments = {
        "value": value,
        "reference_points": torch.rand(2, 5, 3, 2),
        "spatial_shapes": torch.tensor(LEVELS),
        "level_start_index": torch.tensor([0, 12, 16]),
    }
    expected = layer(query, **arguments)
    # On a CPU mmcv's layer goes past the op, to the function below it; send it through.
    plain = module.multi_scale_deformable_attn_pytorch
    calls = []

    def through_the_op(value, shapes, locations, weights):
        calls.append(shapes)
        monkeypatch.setattr(module, plain.__name__, plain)
        return attend(value, shapes.tolist(), locations, weights)

    monkeypatch.setattr(module, plain.__name__, through_the_op)
    torch.testing.assert_close(layer(query, **arguments), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_formats_round_only_the_result(
    mmcv_ops: ModuleType, dtype: torch.dtype
) -> None:
    half = [t.detach().to(dtype).requires_grad_() for t in tensors(LEVELS)]
    full = [t.detach().float().requires_grad_() for t in half]
    outputs = [attend(t[0], LEVELS, *t[1:]) for t in (half, full)]
    torch.testing.assert_close(outputs[0], outputs[1].to(dtype), rtol=0, atol=0)
    outputs[0].sum().backward()
    outputs[1].sum().backward()
    for low, high in zip(half, full, strict=True):
        torch.testing.assert_close(low.grad, high.grad.to(dtype))


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"queries": 0}], ids=["no-images", "no-queries"]
)
def test_empty_input_gives_empty_output_and_zero_gradients(
    mmcv_ops: ModuleType, empty: dict[str, int]
) -> None:
    inputs = tensors(LEVELS, **empty)
    output = attend(inputs[0], LEVELS, *inputs[1:])
    assert output.shape == (empty.get("batch", 2), empty.get("queries", 3), 6)
    output.sum().backward()
    for tensor in inputs:
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor))
