"""Attention by landmarks against its definition, softmax, and torch's own layers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from mmcastling.attention import (
    Attention,
    build_mixer,
    fast,
    l2_normalize,
    landmark_attention,
    landmarks,
)
from mmcastling.attention.fast import mixed_landmark_attention
from mmcastling.attention.landmarks import interpolate, pool

SHAPES = dict(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    extra=st.integers(0, 2),
    landmarks=st.integers(1, 4),
    heads=st.integers(1, 3),
    dims=st.integers(1, 5),
    values=st.integers(1, 5),
)


def draw(grid, extra=1, heads=2, dims=4, values=5, dtype=torch.float64, seed=0):
    noise = torch.Generator().manual_seed(seed)
    tokens = extra + math.prod(grid)
    q, k, v = (
        torch.randn(2, heads, tokens, size, generator=noise, dtype=torch.float64)
        for size in (dims, dims, values)
    )
    factors = torch.randn(4, heads, generator=noise, dtype=torch.float64)
    learned = dict(balance=tuple(factors[:3]), sharpness=factors[3])
    return [x.to(dtype) for x in (q, k, v)], learned


def softmax(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def on_maps(layer, x, grid):
    """A layer of torch on the tokens of a grid, ``(B, h, H * W, d)``."""
    maps = layer(x.flatten(0, 1).mT.unflatten(2, grid))
    return maps.flatten(2).mT.unflatten(0, x.shape[:2])


def cells_of(grid, landmarks):
    """How many landmarks differ along each side of a grid."""
    return tuple(min(side, landmarks) for side in grid)


def repeated(x, cells, landmarks):
    """Maps of cells ``(..., H, W)``, each as often as there are landmarks in it."""
    rows, columns = (torch.arange(landmarks) * n // landmarks for n in cells)
    return x[..., rows, :][..., columns]


def defined(q, k, v, *, grid, landmarks, balance, sharpness):
    """Word by word, with a loop over regions."""
    extra, cells = q.shape[2] - math.prod(grid), cells_of(grid, landmarks)
    own, even, gain = (factor[:, None, None] for factor in balance)

    def spread(x):
        up = nn.Upsample(grid, mode="bilinear")
        return torch.cat([x[:, :, :extra], on_maps(up, x[:, :, extra:], cells)], 2)

    means = on_maps(nn.AdaptiveAvgPool2d(cells), q[:, :, extra:], grid)
    queries = torch.cat([q[:, :, :extra], means], 2)
    logits = sharpness[:, None, None] * queries @ k.mT / q.shape[-1] ** 0.5
    attention = torch.softmax(logits, dim=-1)
    side, covariance = math.ceil(landmarks / 2), 0
    maps = attention[:, :, extra:].mT  # regions as pixels, keys as channels
    maps = repeated(maps.flatten(0, 1).unflatten(2, cells), cells, landmarks)
    blocks = nn.AdaptiveAvgPool2d(side)(maps).flatten(2).mT.unflatten(0, v.shape[:2])
    for row in blocks.unbind(2):
        apart = k - row.unsqueeze(2) @ k
        covariance = covariance + (row.unsqueeze(3) * apart).mT @ v / side**2
    linear = (q - spread(queries)) @ covariance / q.shape[-1] ** 0.5
    return own * v + even * spread(attention @ v) + gain * linear


@settings(max_examples=60, deadline=None)
@given(**SHAPES, norm_output=st.booleans(), residual=st.booleans(), rows=st.just(2))
def test_it_is_what_is_defined_also_a_few_tokens_at_a_time(
    grid, extra, landmarks, norm_output, residual, rows, **shape
):
    (q, k, v), learned = draw(grid, extra, **shape)
    options = dict(grid=grid, landmarks=landmarks, **learned)
    expected = defined(q, k, v, **options)
    assert_close(landmark_attention(q, k, v, **options), expected)
    whole = l2_normalize(expected) if norm_output else expected
    added = torch.ones_like(v) if residual else None
    options.update(norm_output=norm_output, residual=added)
    whole = whole if added is None else whole + added
    for recorded in (True, False):  # a graph is built of all tokens at once
        with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(recorded):
            patch.setattr(fast, "_CHUNK", 1)
            patch.setattr(fast, "_LEAST_ROWS", rows)
            inputs = [q.clone().requires_grad_(recorded), k, v]
            found = mixed_landmark_attention(*inputs, **options)
        assert found.requires_grad is recorded
        # Shorter rows have no direction.
        long = (expected.norm(dim=-1, keepdim=True) > 1e-6) | (not norm_output)
        assert_close(found * long, whole * long, atol=1e-8, rtol=1e-7)


@settings(max_examples=30, deadline=None)
@given(**SHAPES)
def test_queries_that_are_landmarks_have_what_softmax_gives_them(grid, extra, **shape):
    shape.pop("landmarks")
    side = max(grid)
    (q, k, v), _ = draw((side, side), extra, **shape)
    found = landmark_attention(q, k, v, grid=(side, side), landmarks=side)
    assert_close(found, softmax(q, k, v))


def test_a_token_outside_the_grid_has_what_softmax_gives_it():
    (q, k, v), _ = draw((5, 6), extra=2)
    found = landmark_attention(q, k, v, grid=(5, 6), landmarks=2)
    exact = softmax(q, k, v)
    assert_close(found[:, :, :2], exact[:, :, :2])
    assert not torch.allclose(found, exact, atol=0.1)


def test_what_is_left_out_is_of_second_order():
    (q, k, v), _ = draw((6, 6), extra=0)
    mean = q.mean(2, keepdim=True)

    def error(small):
        near = mean + small * (q - mean)
        found = landmark_attention(near, k, v, grid=(6, 6), landmarks=1)
        return (found - softmax(near, k, v)).norm().item()

    assert error(1e-3) < 1.1e-2 * error(1e-2)


def test_more_landmarks_are_nearer_to_softmax_and_a_common_key_is_not_seen():
    (q, k, v), _ = draw((16, 16), dims=8)
    maps = nn.functional.avg_pool2d(
        q[:, :, 1:].mT.unflatten(3, (16, 16)).flatten(0, 1), 5, 1, 2
    )
    q[:, :, 1:] = 6 * maps.flatten(2).mT.unflatten(0, q.shape[:2])
    options = dict(grid=(16, 16))
    errors = [
        (landmark_attention(q, k, v, landmarks=n, **options) - softmax(q, k, v)).norm()
        for n in (1, 2, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9
    moved = landmark_attention(q, k + 9, v, landmarks=4, **options)
    assert_close(moved, landmark_attention(q, k, v, landmarks=4, **options))


@pytest.mark.parametrize("norm_output", [False, True])
def test_gradients_reach_everything_and_few_passes_have_the_same(norm_output):
    inputs, learned = draw((3, 4), heads=2)
    leaves = [x.requires_grad_() for x in (*inputs, *learned["balance"])]
    leaves.append(learned["sharpness"].requires_grad_())
    options = dict(grid=(3, 4), landmarks=2, **learned)
    expected = landmark_attention(*inputs, **options)
    expected = l2_normalize(expected) if norm_output else expected
    found = mixed_landmark_attention(*inputs, norm_output=norm_output, **options)
    grad = torch.randn_like(found)
    grads = [torch.autograd.grad(y, leaves, grad) for y in (found, expected)]
    assert all(part.count_nonzero() for part in grads[1])
    assert_close(*grads)

    def run(*leaves):
        factors = dict(balance=leaves[3:6], sharpness=leaves[6])
        return landmark_attention(*leaves[:3], grid=(3, 4), landmarks=2, **factors)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_full(dtype, autocast):
    inputs, learned = draw((9, 9), dims=16, values=16, dtype=dtype)
    learned = dict(balance=None, sharpness=None) if autocast else learned
    options = dict(grid=(9, 9), landmarks=3, **learned)
    expected = landmark_attention(*(x.double() for x in inputs), **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = landmark_attention(*inputs, **options)
    assert found.dtype is torch.float32
    assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(**SHAPES)
def test_regions_are_those_of_torchs_layers(grid, extra, landmarks, **shape):
    (x, _, _), _ = draw(grid, extra, **shape)
    cells = cells_of(grid, landmarks)
    means = pool(x, grid=grid, landmarks=landmarks)
    expected = on_maps(nn.AdaptiveAvgPool2d(cells), x[:, :, extra:], grid)
    maps = expected.mT.unflatten(3, cells)
    all_of_them = repeated(maps, cells, landmarks).flatten(3).mT
    assert_close(means[:, :, extra:], all_of_them)
    back = interpolate(means, grid=grid, landmarks=landmarks)
    up = nn.Upsample(grid, mode="bilinear")
    assert_close(back[:, :, extra:], on_maps(up, expected, cells))
    assert_close(means[:, :, :extra], x[:, :, :extra])
    assert_close(back[:, :, :extra], x[:, :, :extra])


@pytest.mark.parametrize("grid", [(7, 7), (1, 1), (1, 8), (4, 3)])
@pytest.mark.parametrize("extra", [0, 2])
def test_a_grid_of_no_more_tokens_than_landmarks_has_softmax(grid, extra):
    (q, k, v), learned = draw(grid, extra)
    found = landmark_attention(q, k, v, grid=grid, landmarks=8)
    assert_close(found, softmax(q, k, v))
    leaves = [x.requires_grad_() for x in (q, k, v, *learned["balance"])]
    found = landmark_attention(q, k, v, grid=grid, landmarks=8, **learned)
    grads = torch.autograd.grad(found.sum(), leaves)  # none is unused
    own, even, _ = (factor[:, None, None] for factor in learned["balance"])
    sharp = q * learned["sharpness"][:, None, None]
    expected = own * v + even * softmax(sharp, k, v)
    assert_close(found, expected)
    assert_close(grads[:5], torch.autograd.grad(expected.sum(), leaves[:5]))
    # A graph for all grids takes as many landmarks as ever, some of them the same.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landmarks, "_all_are_landmarks", lambda *_: False)
        assert_close(
            landmark_attention(q, k, v, grid=grid, landmarks=8, **learned), expected
        )


def test_what_all_keys_and_values_have_in_common_costs_no_precision():
    (q, k, v), _ = draw((24, 24), dims=32, values=32)
    options = dict(grid=(24, 24), landmarks=8)
    exact = landmark_attention(q, k, v, **options)
    for common in (10.0, 100.0):
        moved = (x.float() for x in (q, k + common, v + common))
        found = landmark_attention(*moved, **options).double() - common
        plain = softmax(q.float(), k.float() + common, v.float() + common)
        rounded = (plain.double() - common - softmax(q, k, v)).norm()
        assert (found - exact).norm() < 3 * rounded


@pytest.mark.parametrize("conv", [None, "token", "grid"])
def test_the_mixer_asks_for_the_grid(conv):
    attention = Attention(24, 3, form="landmarks", local_conv=conv, landmarks=2)
    assert attention.mixer.uses_grid
    x = torch.randn(2, 13, 24)
    assert attention(x, (3, 4)).shape == x.shape
    with pytest.raises(ValueError, match=r"grid=\(H, W\), or use "):
        attention(x)


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "8"])
def test_landmarks_are_counted(count):
    with pytest.raises(ValueError, match=f"landmarks {count!r} must be a positive"):
        build_mixer(dict(form="landmarks", landmarks=count), 3, 8)


@pytest.mark.parametrize("form", ["average", "learned", "landmarks"])
def test_no_tokens_have_no_gradient(form):
    attention = Attention(24, 3, form=form, local_conv=None, mask_threshold=1.0)
    attention(torch.zeros(2, 0, 24), (0, 0)).sum().backward()
    grads = [p.grad for p in attention.parameters() if p.grad is not None]
    assert not any(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_serves_all_grids(training):
    attention = Attention(24, 3, form="landmarks", local_conv="grid", landmarks=3)
    if not training:
        attention.eval().mixer.set_mask(1.0)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for grid in ((6, 8), (9, 11), (5, 4), (2, 7)):
        x = torch.randn(2, math.prod(grid) + 1, 24)
        with torch.set_grad_enabled(training):
            assert_close(compiled(x, grid), attention(x, grid))


def test_what_is_made_once_serves_whatever_comes_later():
    (q, k, v), _ = draw((5, 11), extra=0)
    options = dict(grid=(5, 11), landmarks=3)
    with torch.inference_mode():
        expected = landmark_attention(q, k, v, **options)
    y = landmark_attention(q.requires_grad_(), k, v, **options)
    y.sum().backward()
    assert_close(y.detach(), expected.clone())
    assert q.grad.isfinite().all()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x.detach()) for x in (q, k, v)]
        assert landmark_attention(*fake, **options).shape == v.shape
    after = landmark_attention(q, k, v, **options)
    assert_close(after.detach(), expected.clone())
    half = landmark_attention(*(x.detach().float() for x in (q, k, v)), **options)
    assert half.dtype is torch.float32
    assert_close(half.double(), expected.clone(), atol=1e-5, rtol=1e-5)
