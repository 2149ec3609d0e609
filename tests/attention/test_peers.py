"""The peers against their papers' definitions, written with N x N matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from mmcastling.attention import Attention, build_mixer
from mmcastling.attention.peers.performer import (
    orthogonal_directions,
    performer_attention,
    performer_log_features,
)

PEERS = ["performer", "efficient", "hydra", "relu_linear", "focused"]


def qkv(batch=2, heads=3, tokens=7, dims=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dims)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3)]


def mixer(kind, heads=3, dims=4, **options):
    torch.manual_seed(1)
    options = {"local_conv": None, **options}
    return build_mixer(dict(type=kind, **options), num_heads=heads, head_dims=dims)


# -- definitions -----------------------------------------------------------------------


def normalised(weights, v):
    return weights / weights.sum(-1, keepdim=True) @ v


def define_performer(mixer, q, k, v):
    w = mixer.directions

    def phi(x):
        x = x / x.shape[-1] ** 0.25
        return torch.exp(x @ w.T) * torch.exp(-(x**2).sum(-1, keepdim=True) / 2)

    return normalised(phi(q) @ phi(k).transpose(-2, -1), v)


def define_efficient(mixer, q, k, v):
    rows = q.exp() / q.exp().sum(-1, keepdim=True)
    columns = k.exp() / k.exp().sum(-2, keepdim=True)
    return rows @ columns.transpose(-2, -1) @ v


def define_hydra(mixer, q, k, v):
    q = q / q.square().sum((1, 3), keepdim=True).sqrt()
    k = k / k.square().sum((1, 3), keepdim=True).sqrt()
    weights = torch.einsum("bhic,bhjc->bhcij", q, k)  # one matrix per channel
    return torch.einsum("bhcij,bhjc->bhic", weights, v)


def define_relu_linear(mixer, q, k, v):
    return normalised(q.clamp_min(0) @ k.clamp_min(0).transpose(-2, -1), v)


def define_focused(mixer, q, k, v):
    scale = torch.log1p(mixer.scale.exp()).reshape(1, 3, 1, 4)

    def focus(x):
        x = x.clamp_min(0) / scale
        powered = x**3
        lengths = [t.square().sum((1, 3), keepdim=True).sqrt() for t in (x, powered)]
        return lengths[0] / lengths[1] * powered

    return normalised(focus(q) @ focus(k).transpose(-2, -1), v)


@pytest.mark.parametrize("kind", PEERS)
def test_linear_form_equals_the_quadratic_definition(kind):
    peer, inputs = mixer(kind).double(), qkv()
    if kind == "focused":
        torch.nn.init.normal_(peer.scale)  # so that softplus(scale) differs per channel
    for t in inputs[:2]:
        t[..., 0] = t[..., 0].abs() + 0.1  # the definitions divide by zero without it
    inputs = [t.requires_grad_() for t in inputs]
    out, expected = peer(*inputs), globals()[f"define_{kind}"](peer, *inputs)
    assert_close(out, expected)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    assert_close(grads, torch.autograd.grad((expected * weights).sum(), inputs))


# -- Performer -------------------------------------------------------------------------


def test_performer_estimates_the_softmax_kernel_without_bias():
    """The mean over 600 seeds lies within five standard errors of the kernel."""
    q, k, _ = qkv(batch=1, heads=1, tokens=4, dims=4)
    exact = torch.exp(q @ k.transpose(-2, -1) / 2)
    samples = []
    for seed in range(600):
        directions = orthogonal_directions(8, 4, seed).double()
        phi_q = performer_log_features(q, directions).exp()
        phi_k = performer_log_features(k, directions).exp()
        samples.append(phi_q @ phi_k.transpose(-2, -1))
    samples = torch.stack(samples)
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - exact).abs() < 5 * error).all()
    assert (error < 0.2 * exact).all()  # the bound above says something


def test_performer_approaches_softmax_attention_with_more_features():
    q, k, v = qkv(tokens=20)
    inputs = (q / 2, k / 2, v)  # the variance grows with exp(|q + k|^2)
    exact = torch.nn.functional.scaled_dot_product_attention(*inputs)

    def error(num_features):
        estimates = [
            performer_attention(*inputs, orthogonal_directions(num_features, 4, seed))
            for seed in range(5)
        ]
        return (torch.stack(estimates) - exact).abs().mean().item()

    errors = [error(num_features) for num_features in (4, 32, 512)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


def test_directions_are_orthogonal_within_a_block_and_gaussian_in_length():
    blocks = orthogonal_directions(4000, 8).reshape(-1, 8, 8)
    gram = blocks @ blocks.transpose(-2, -1)
    off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4
    # Mean and variance of a chi-squared variable with eight degrees of freedom.
    squared = blocks.square().sum(-1)
    assert squared.mean().item() == pytest.approx(8, abs=5 * 4 / math.sqrt(4000))
    assert squared.var().item() == pytest.approx(16, rel=0.2)


def test_features_follow_the_seed_and_travel_with_the_checkpoint():
    first, again = mixer("performer"), mixer("performer")
    other = mixer("performer", seed=1)
    assert_close(first.directions, again.directions, rtol=0, atol=0)
    assert (first.directions - other.directions).abs().max() > 0.1
    other.load_state_dict(first.state_dict())
    assert_close(first(*qkv()), other(*qkv()), rtol=0, atol=0)


def test_drawing_features_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    build_mixer(dict(type="performer"), num_heads=3, head_dims=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_performer_agrees_with_an_independent_implementation():
    performer_pytorch = pytest.importorskip(
        "performer_pytorch",
        reason="performer-pytorch is not installed: pip install performer-pytorch",
        exc_type=ImportError,
    )
    theirs = performer_pytorch.FastAttention(dim_heads=4, nb_features=16).double()
    q, k, v = qkv(tokens=30)
    q, k = q / 2, k / 2  # theirs adds 1e-4 to every feature: small against these
    ours = performer_attention(q, k, v, theirs.projection_matrix)
    assert_close(ours, theirs(q, k, v), atol=5e-3, rtol=0)


# -- robustness ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PEERS)
def test_zero_rows_give_no_nan_also_in_the_gradient(kind):
    inputs = qkv(dtype=torch.float32)
    for t in inputs:
        t[:, :, 2] = 0.0
    inputs = [t.requires_grad_() for t in inputs]
    out = mixer(kind)(*inputs)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(t.grad).all() for t in inputs)


@pytest.mark.parametrize("kind", PEERS)
def test_all_zero_keys_and_queries_give_no_nan(kind):
    q = torch.zeros(1, 3, 5, 4, requires_grad=True)
    out = mixer(kind)(q, q, torch.ones(1, 3, 5, 4))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("kind", PEERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    peer = mixer(kind)
    inputs = [20 * t.to(dtype) for t in qkv(tokens=2048, dtype=torch.float32)]
    out = peer.mix(*inputs)
    assert out.dtype == torch.float32
    assert_close(out, peer.mix(*(t.float() for t in inputs)))
    assert peer(*inputs).dtype == dtype
    assert torch.isfinite(peer(*inputs)).all()


@pytest.mark.parametrize("kind", PEERS)
def test_bfloat16_autocast_stays_finite(kind):
    torch.manual_seed(1)
    attention = Attention(24, 3, type=kind)
    x = 1e3 * torch.randn(2, 36, 24)
    x[0, 3] = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(x, (6, 6))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
    for parameter in attention.parameters():
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("kind", PEERS)
def test_memory_is_linear_in_the_tokens(kind):
    tokens = 100_000  # one N x N float32 matrix would take 40 GB
    q = torch.randn(1, 1, tokens, 4)
    assert mixer(kind, heads=1)(q, q, q).shape == (1, 1, tokens, 4)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(PEERS),
    conv=st.sampled_from(["token", "grid", None]),
    norm=st.booleans(),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    dims=st.integers(1, 9),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    extra=st.integers(0, 2),
)
def test_any_shape_and_local_convolution(
    kind, conv, norm, batch, heads, dims, height, width, extra
):
    peer = mixer(kind, heads, dims, local_conv=conv, norm_output=norm)
    inputs = qkv(batch, heads, extra + height * width, dims, torch.float32)
    inputs = [t.requires_grad_() for t in inputs]
    out = peer(*inputs, (height, width))
    assert out.shape == inputs[2].shape
    out.sum().backward()
    for t in [*inputs, *peer.parameters()]:
        assert torch.isfinite(t.grad).all()


@pytest.mark.parametrize("kind", ["performer", "efficient", "relu_linear", "focused"])
def test_values_may_be_wider_than_keys(kind):
    spec = dict(type=kind, local_conv=None)
    peer = build_mixer(spec, num_heads=3, head_dims=8, key_dims=4)
    q, k, v = qkv(dtype=torch.float32)
    assert peer(q, k, torch.cat((v, v), dim=-1)).shape == (2, 3, 7, 8)


def test_focused_convolution_shares_its_kernels_over_heads_and_skips_class_tokens():
    peer = mixer("focused", local_conv="focused")
    assert sum(p.numel() for p in peer.local_conv.parameters()) == 4 * 25 + 4
    v = torch.randn(1, 1, 1 + 30, 4).repeat(1, 3, 1, 1)
    out = peer.convolve(v, (5, 6))
    assert_close(out[:, 0], out[:, 2])
    assert (
        out[:, :, 0].abs().max() == 0 and out[:, :, 1:].abs().min(-1).values.max() > 0
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="performer", num_features=0), "num_features 0 must be a positive"),
        (dict(type="focused", focus=0.5), r"focus 0\.5 must be at least 1"),
        (dict(type="focused", local_conv="line"), "'line' is not known"),
        (dict(type="hydra", heads=2), "unexpected keyword argument 'heads'"),
        (dict(type="cosformer"), r"'cosformer' is not known: choose one of.*performer"),
    ],
)
def test_bad_options_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        Attention(12, 3, **spec)


@pytest.mark.parametrize("spec", [["castling"], "castling", 3])
def test_what_is_no_options_is_named(spec):
    with pytest.raises(ValueError, match=r"attention=.*: expected options, such as"):
        build_mixer(spec, 3, 4)


def test_hydra_needs_values_as_wide_as_keys():
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(ValueError, match="as many channels per head, not 4 and 8"):
        mixer("hydra", dims=8)(q, k, torch.cat((v, v), dim=-1))
