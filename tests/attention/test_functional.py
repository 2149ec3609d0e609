"""Angular attention against its definition."""

import itertools
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
from mmcastling.attention.fast import mixed_linear_angular_attention
from mmcastling.attention.functional import LEAST_CENTERED


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


def learned(heads):
    noise = torch.Generator().manual_seed(5)
    return tuple(torch.randn(3, heads, generator=noise, dtype=torch.float64))


FORMS = {
    "released": lambda heads: {},
    "reference": lambda heads: dict(reference_tokens=5),
    "centered": lambda heads: dict(center_keys=True),
    "average": lambda heads: dict(form="average"),
    "average centered": lambda heads: dict(form="average", center_keys=True),
    "learned": lambda heads: dict(
        form="average", center_keys=True, balance=learned(heads)
    ),
}


def pairwise(q, k, v, **options):
    """Any form as a matrix of weights of every pair, in O(N^2)."""
    return matrix(q, k, **options) @ v


def matrix(q, k, form="released", center_keys=False, balance=None, **options):
    """The weights ``(B, h, N, N)`` of any form."""
    tokens = k.shape[2]
    if center_keys:
        center = k.mean(2, keepdim=True)
        k = k - center
        least = LEAST_CENTERED * center.norm(dim=-1, keepdim=True)
        length = k.norm(dim=-1, keepdim=True)
        k = k * (length / least).clamp(max=1) / length.clamp_min(1e-12)
    else:
        k = l2_normalize(k)
    cosine = l2_normalize(q) @ k.mT
    alone = torch.eye(tokens, dtype=k.dtype)
    if form == "released":
        scale = options.get("reference_tokens", tokens) / tokens
        return alone / 2 + scale * cosine / math.pi
    own, even, gain = 0, 1, 1
    if balance is not None:
        own, even, gain = (factor[:, None, None] for factor in balance)
    return own * alone + (even + 4 * gain * cosine) / tokens


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(**SHAPES)
def test_every_form_equals_its_pairs(form, **shape):
    q, k, v = qkv(**shape)
    options = FORMS[form](shape["heads"])
    expected = pairwise(q, k, v, **options)
    assert_close(linear_angular_attention(q, k, v, **options), expected)
    for norm_output in (False, True):
        for added in (None, torch.ones_like(v)):
            found = mixed_linear_angular_attention(
                q, k, v, norm_output=norm_output, residual=added, **options
            )
            whole = l2_normalize(expected) if norm_output else expected
            assert_close(found, whole if added is None else whole + added)


def test_keys_of_a_common_offset_are_told_apart_once_centred():
    q, k, v = qkv()
    options = dict(form="average", center_keys=True)
    plain = linear_angular_attention(q, k, v, **options)
    assert_close(linear_angular_attention(q, k + 9, v, **options), plain)
    assert not torch.allclose(linear_angular_attention(q, k + 9, v), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_of_equal_keys_no_more_is_left_than_rounding(dtype):
    """Softmax averages then, and rounding must not be taken for directions."""
    torch.manual_seed(0)
    q, v = torch.randn(2, 1, 2, 4, 16).to(dtype).unbind()
    noise = torch.finfo(dtype).eps * torch.rand(1, 2, 4, 16)
    k = (torch.randn(16) * (1 + noise)).to(dtype)
    options = dict(form="average", center_keys=True)
    y = linear_angular_attention(q, k, v, **options)
    share = 2 * torch.finfo(dtype).eps / LEAST_CENTERED
    assert (y - v.mean(2, keepdim=True)).norm() < share * v.norm()


def test_the_average_form_does_not_grow_with_the_number_of_tokens():
    q, k, v = qkv(tokens=6)
    twice = [torch.cat([x, x], dim=2) for x in (q, k, v)]
    options = dict(form="average", center_keys=True)
    assert_close(
        linear_angular_attention(*twice, **options)[:, :, :6],
        linear_angular_attention(q, k, v, **options),
    )


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_direction_is_that_of_linear_angular_attention(dtype, form):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, 11, 8, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(3)
    )
    q[0, 0, 0], k[0, 0, 1], v[0, 0, 2] = 0, 0, 0  # rows without a direction
    q[0, 1, 0] *= 1e-10
    q[0, 1, 1] *= 1e4
    v[1] = 0
    options = FORMS[form](3)
    expected = l2_normalize(linear_angular_attention(q, k, v, **options))
    found = mixed_linear_angular_attention(q, k, v, norm_output=True, **options)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found[1].any() and found[0, 0, 0].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_output", [False, True])
def test_fewer_passes_have_the_same_gradients(form, norm_output):
    options = FORMS[form](2)
    inputs = [
        torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    balance = options.get("balance", ())
    learned = [factor.requires_grad_() for factor in balance]
    grad = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    expected = linear_angular_attention(*inputs, **options)
    if norm_output:
        expected = l2_normalize(expected)
    found = mixed_linear_angular_attention(*inputs, norm_output=norm_output, **options)
    found, expected = (
        torch.autograd.grad(y, [*inputs, *learned], grad) for y in (found, expected)
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", [True, False])
@settings(max_examples=15, deadline=None)
@given(**SHAPES, rows=st.integers(1, 40), norm_output=st.booleans())
def test_few_tokens_at_a_time_give_what_all_give(
    dtype, form, residual, rows, norm_output, batch, heads, tokens, dims, values, seed
):
    q, k, v = qkv(batch, heads, tokens, dims, values, dtype, seed)
    added = torch.ones_like(v) if residual else None
    options = dict(FORMS[form](heads), norm_output=norm_output)
    expected = mixed_linear_angular_attention(q, k, v, **options, residual=added)
    inputs = [x for x in (q, k, v, added) if x is not None]
    kept = [x.clone() for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_CHUNK", 0)
        patch.setattr(fast, "_LEAST_ROWS", rows)
        found = mixed_linear_angular_attention(q, k, v, **options, residual=added)
    assert found.shape == expected.shape
    # With a residual the result is rounded to the dtype of the values.
    exact = dtype is not torch.bfloat16 or not residual
    found, scale = found.to(expected.dtype), 1.0
    if exact:  # rounding is of the terms, also where they cancel before a norm
        weights = matrix(q.double(), k.double(), **FORMS[form](heads))
        terms = (weights.abs() @ v.double().abs()).norm(dim=-1, keepdim=True)
        row = (weights @ v.double()).norm(dim=-1, keepdim=True)
        scale = (terms / row.clamp_min(1e-12) if norm_output else terms).clamp_min(1)
    tolerance = 1e-9 if dtype is torch.float64 else 1e-5 if exact else 1e-2
    assert_close(found / scale, expected / scale, atol=tolerance, rtol=tolerance)
    assert_close(inputs, kept, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 3, 0, 4)])
def test_no_images_and_no_tokens_give_none(shape):
    for grad, form in itertools.product((False, True), FORMS.values()):
        q, k, v = (torch.randn(shape, requires_grad=grad) for _ in range(3))
        options = dict(norm_output=True, **form(shape[1]))
        assert mixed_linear_angular_attention(q, k, v, **options).shape == shape


def test_gradients_are_of_all_tokens_at_once(monkeypatch):
    monkeypatch.setattr(fast, "_CHUNK", 0)
    monkeypatch.setattr(fast, "_LEAST_ROWS", 2)
    for index in range(4):  # whichever of the inputs is trained
        inputs = [*qkv(tokens=6, values=4), *qkv(tokens=6, values=4, seed=1)[:1]]
        inputs[index].requires_grad_()
        q, k, v, residual = inputs
        expected = l2_normalize(linear_angular_attention(q, k, v), residual=residual)
        found = mixed_linear_angular_attention(
            q, k, v, norm_output=True, residual=residual
        )
        grads = (torch.autograd.grad(y.sum(), inputs[index]) for y in (found, expected))
        assert_close(*grads)
    q, k, v = qkv(tokens=6)  # or none of them, and the factors alone
    factors = [torch.randn(3, dtype=q.dtype, requires_grad=True) for _ in range(3)]
    terms = dict(form="average", balance=tuple(factors))
    expected = linear_angular_attention(q, k, v, **terms)
    found = mixed_linear_angular_attention(q, k, v, norm_output=False, **terms)
    grads = (torch.autograd.grad(y.square().sum(), factors) for y in (found, expected))
    assert_close(*grads)
