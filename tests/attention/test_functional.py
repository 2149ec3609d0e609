"""Angular attention against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmcastling.attention import (
    angular_attention,
    angular_similarity,
    angular_similarity_series,
    fast,
    l2_normalize,
    linear_angular_attention,
)
from mmcastling.attention.fast import normalized_linear_angular_attention


def qkv(batch=2, heads=3, tokens=7, dims=4, values=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, tokens, d) for d in (dims, dims, values)]
    return [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]


SHAPES = dict(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 33),
    dims=st.integers(1, 9),
    values=st.integers(1, 9),
    seed=st.integers(0, 99),
)


# -- the angular kernel ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("angle", "expected"),
    [(0.0, 1.0), (math.pi / 3, 2 / 3), (math.pi / 2, 0.5), (math.pi, 0.0)],
    ids=["same", "60deg", "right", "opposite"],
)
def test_similarity_falls_linearly_with_the_angle(angle, expected):
    q = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    k = 5 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert_close(angular_similarity(q, k).item(), expected, atol=1e-7, rtol=0)


def test_series_converges_to_the_exact_kernel_and_starts_linear():
    q, k, _ = qkv(tokens=12)
    exact = angular_similarity(q, k)
    cosine = l2_normalize(q) @ l2_normalize(k).transpose(-2, -1)
    assert_close(angular_similarity_series(q, k, 0), 0.5 + cosine / math.pi)
    inside = cosine.abs() < 0.9  # convergence is slow at the ends
    errors = [
        (angular_similarity_series(q, k, n) - exact)[inside].abs().max().item()
        for n in (0, 2, 8, 32)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_released_constant_acts_on_the_token_itself():
    q, k, v = qkv()
    per_token = angular_attention(q, k, v)
    literal = angular_attention(q, k, v, literal_constant=True)
    assert_close(literal - per_token, 0.5 * (v.sum(-2, keepdim=True) - v))


# -- the linear terms ------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_linear_form_equals_the_quadratic_definition(**shape):
    q, k, v = qkv(**shape)
    expected = 0.5 * v + (angular_similarity_series(q, k, 0) - 0.5) @ v
    assert_close(linear_angular_attention(q, k, v), expected)


def test_reference_tokens_scale_the_linear_term_only():
    q, k, v = qkv(tokens=8)
    plain = linear_angular_attention(q, k, v)
    assert_close(linear_angular_attention(q, k, v, reference_tokens=8), plain)
    halved = linear_angular_attention(q, k, v, reference_tokens=4)
    assert_close(halved - 0.5 * v, (plain - 0.5 * v) / 2)


def test_linear_attention_never_builds_a_token_by_token_matrix():
    tokens = 200_000  # one N x N float32 matrix would take 160 GB
    q, k, v = (torch.randn(1, 1, tokens, 4) for _ in range(3))
    assert linear_angular_attention(q, k, v).shape == (1, 1, tokens, 4)


def test_linear_attention_gradients():
    inputs = [t.requires_grad_() for t in qkv(batch=1, heads=2, tokens=5)]
    assert torch.autograd.gradcheck(linear_angular_attention, inputs)


def test_zero_tokens_give_zero_not_nan_also_in_the_gradient():
    q, k, v = qkv()
    q[:, :, 2], k[:, :, 3] = 0.0, 0.0
    q.requires_grad_()
    out = linear_angular_attention(q, k, v)
    assert_close(out[:, :, 2], 0.5 * v[:, :, 2])
    out.sum().backward()
    assert_close(q.grad[:, :, 2], torch.zeros_like(q.grad[:, :, 2]))
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_direction_alone_matters_whatever_the_magnitude(scale):
    q, k, v = qkv(dtype=torch.float32)
    expected = linear_angular_attention(q, k, v)
    assert_close(linear_angular_attention(scale * q, scale * k, v), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v = (100 * t.to(dtype) for t in qkv(tokens=4096, dtype=torch.float32))
    out = linear_angular_attention(q, k, v)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert_close(out, linear_angular_attention(q.float(), k.float(), v.float()))


def test_autocast_does_not_reach_inside():
    q, k, v = qkv(dtype=torch.float32)
    expected = linear_angular_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(linear_angular_attention(q, k, v), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reference_tokens", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_direction_is_that_of_linear_angular_attention(dtype, reference_tokens):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, 11, 8, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    )
    q[0, 0, 0], k[0, 0, 1], v[0, 0, 2] = 0, 0, 0  # rows without a direction
    q[0, 1, 0] *= 1e-10
    q[0, 1, 1] *= 1e4
    v[1] = 0
    options = dict(reference_tokens=reference_tokens)
    expected = l2_normalize(linear_angular_attention(q, k, v, **options))
    found = normalized_linear_angular_attention(q, k, v, **options)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found[1].any() and found[0, 0, 0].any()


def test_direction_has_the_same_gradients():
    inputs = [
        torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    grad = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    expected = torch.autograd.grad(
        l2_normalize(linear_angular_attention(*inputs)), inputs, grad
    )
    found = torch.autograd.grad(
        normalized_linear_angular_attention(*inputs), inputs, grad
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reference_tokens", [None, 16])
@pytest.mark.parametrize("residual", [True, False])
@settings(max_examples=20, deadline=None)
@given(**SHAPES, rows=st.integers(1, 40))
def test_few_tokens_at_a_time_give_what_all_give(
    dtype, reference_tokens, residual, rows, batch, heads, tokens, dims, values, seed
):
    q, k, v = qkv(batch, heads, tokens, dims, values, dtype, seed)
    added = torch.ones_like(v) if residual else None
    options = dict(reference_tokens=reference_tokens)
    expected = normalized_linear_angular_attention(q, k, v, **options, residual=added)
    inputs = [x for x in (q, k, v, added) if x is not None]
    kept = [x.clone() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_CHUNK", 0)
        patch.setattr(fast, "_LEAST_ROWS", rows)
        found = normalized_linear_angular_attention(q, k, v, **options, residual=added)
    assert found.shape == expected.shape
    # With a residual the result is rounded to the dtype of the values.
    exact = dtype is not torch.bfloat16 or not residual
    assert_close(
        *(found.to(expected.dtype), expected),
        **(dict(atol=1e-5, rtol=1e-5) if exact else dict(atol=1e-2, rtol=1e-2)),
    )
    assert_close(inputs, kept, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 3, 0, 4)])
def test_no_images_and_no_tokens_give_none(shape):
    for grad in (False, True):
        q, k, v = (torch.randn(shape, requires_grad=grad) for _ in range(3))
        assert normalized_linear_angular_attention(q, k, v).shape == shape


def test_gradients_are_of_all_tokens_at_once(monkeypatch):
    monkeypatch.setattr(fast, "_CHUNK", 0)
    monkeypatch.setattr(fast, "_LEAST_ROWS", 2)
    for index in range(4):  # whichever of the inputs is trained
        inputs = [*qkv(tokens=6, values=4), *qkv(tokens=6, values=4, seed=1)[:1]]
        inputs[index].requires_grad_()
        q, k, v, residual = inputs
        expected = l2_normalize(linear_angular_attention(q, k, v), residual=residual)
        found = normalized_linear_angular_attention(q, k, v, residual=residual)
        grads = (torch.autograd.grad(y.sum(), inputs[index]) for y in (found, expected))
        assert_close(*grads)
