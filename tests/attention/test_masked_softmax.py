"""The auxiliary branch: the bounded operator, its oracle, and what surrounds it."""

import itertools
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mmcastling.analysis.machine import PeakMemory
from mmcastling.attention import (
    Attention,
    masked_softmax_attention,
    naive_masked_softmax_attention,
)
from mmcastling.attention import masked_softmax as module

FORMS = pytest.mark.parametrize(
    "attention",
    [masked_softmax_attention, naive_masked_softmax_attention],
    ids=["bounded", "naive"],
)


def qkv(
    batch=2,
    heads=3,
    tokens=7,
    keys=None,
    dims=4,
    values=5,
    dtype=torch.float64,
    seed=0,
    sharpness=1.0,
):
    generator = torch.Generator().manual_seed(seed)
    keys = tokens if keys is None else keys
    q, k, v = (
        torch.randn(batch, heads, n, d, generator=generator, dtype=dtype)
        for n, d in ((tokens, dims), (keys, dims), (keys, values))
    )
    return [(sharpness * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()]


@pytest.fixture(params=["one tile", "many tiles"])
def tiling(request, monkeypatch):
    """The operator on one tile, and on tiles of few rows of one head."""
    if request.param == "many tiles":
        monkeypatch.setattr(module, "_TILE_CPU", 24)
        monkeypatch.setattr(module, "_MIN_ROWS", 3)


def grads_of(out, inputs, seed=1):
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype
    )
    return torch.autograd.grad((out * weights).sum(), inputs)


# -- the definition --------------------------------------------------------------------


def entry_by_entry(q, k, v, threshold):
    """The branch pair by pair, its mask, and the sum of what survives."""
    batch, heads, tokens, _ = q.shape
    out = torch.zeros_like(v[:, :, :1]).repeat(1, 1, tokens, 1)
    mask = torch.zeros(batch, heads, tokens, k.shape[2], dtype=torch.bool)
    total = 0.0
    for b in range(batch):
        for h in range(heads):
            for i in range(tokens):
                scores = (k[b, h] * q[b, h, i]).sum(-1) / math.sqrt(q.shape[-1])
                p = scores.exp() / scores.exp().sum()
                for j in range(k.shape[2]):
                    if p[j] > threshold:
                        mask[b, h, i, j] = True
                        out[b, h, i] = out[b, h, i] + p[j] * v[b, h, j]
                        total = total + p[j]
    return out, mask, total


@FORMS
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.2, 0.6, 1.0])
def test_equals_its_definition_forward_and_backward(attention, threshold, tiling):
    inputs = qkv(heads=2, tokens=6)
    out, density = attention(*inputs, threshold=threshold, return_density=True)
    expected, mask, _ = entry_by_entry(*inputs, threshold)
    assert_close(out, expected)
    assert_close(density.item(), mask.double().mean().item(), check_dtype=False)
    if mask.any():
        assert_close(grads_of(out, inputs), grads_of(expected, inputs))


@FORMS
def test_without_threshold_it_is_softmax_attention(attention):
    q, k, v = qkv()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(attention(q, k, v, threshold=0.0), expected)


@FORMS
def test_rows_are_not_renormalised(attention):
    q, k, v = qkv(tokens=9)
    rows = attention(q, k, torch.ones_like(v), threshold=0.15)[..., 0]
    assert (rows < 1.0).all()
    assert rows.max() > 0.15


@FORMS
def test_weight_is_a_factor_of_output_and_gradients(attention):
    inputs = qkv()
    full, quarter = attention(*inputs), attention(*inputs, weight=0.25)
    assert_close(quarter, 0.25 * full)
    expected = [0.25 * grad for grad in grads_of(full, inputs)]
    assert_close(list(grads_of(quarter, inputs)), expected)


def test_a_row_keeps_at_most_one_over_the_threshold_entries():
    q, k, v = qkv(batch=1, heads=1, tokens=200, dtype=torch.float32, sharpness=9.0)
    _, density = masked_softmax_attention(q, k, v, threshold=0.1, return_density=True)
    assert 0 < density * 200 <= 10


@FORMS
def test_uniform_units_follow_the_number_of_keys(attention):
    for tokens in (10, 1000):
        measure = partial(attention, *qkv(tokens=tokens), return_density=True)
        assert measure(threshold="4/N")[1] == measure(threshold=4 / tokens)[1]


# -- the bounded operator against the oracle -------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 40),
    keys=st.integers(1, 40),
    dims=st.integers(1, 9),
    values=st.integers(1, 9),
    threshold=st.sampled_from([0.0, 0.02, "1/N", "4/N", 0.2, 0.9]),
    sharpness=st.sampled_from([0.1, 1.0, 8.0]),
    tile=st.sampled_from([1, 100, 2**20]),
    seed=st.integers(0, 99),
)
def test_equals_the_oracle_for_any_shape(threshold, tile, **shape):
    inputs = qkv(**shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE_CPU", tile)
        patch.setattr(module, "_MIN_ROWS", 5)
        out, density = masked_softmax_attention(
            *inputs, threshold=threshold, weight=0.7, return_density=True
        )
        grads = grads_of(out, inputs)
    expected, expected_density = naive_masked_softmax_attention(
        *inputs, threshold=threshold, weight=0.7, return_density=True
    )
    assert_close(out, expected)
    assert_close(density, expected_density)
    assert_close(grads, grads_of(expected, inputs))


@pytest.mark.parametrize("threshold", [0.001, 0.02, 0.2])
def test_equals_the_oracle_at_a_size_of_several_tiles(threshold):
    inputs = qkv(1, 2, 1300, 1100, 16, 8, torch.float32, sharpness=3.0)
    out = masked_softmax_attention(*inputs, threshold=threshold)
    expected = naive_masked_softmax_attention(*inputs, threshold=threshold)
    assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert_close(
        grads_of(out, inputs), grads_of(expected, inputs), atol=1e-4, rtol=1e-3
    )


def test_gradients_by_finite_differences(tiling):
    inputs = qkv(1, 2, 6, 9)
    q, k, _ = inputs
    p = torch.softmax(q @ k.transpose(-2, -1) / 2.0, dim=-1)
    # The branch jumps where a probability meets the threshold: keep away from there.
    ordered = p.detach().flatten().sort().values
    middle = ordered[60:80]
    widest = middle.diff().argmax()
    threshold = middle[widest : widest + 2].mean().item()
    assert (p - threshold).abs().min() > 1e-4
    assert torch.autograd.gradcheck(
        partial(masked_softmax_attention, threshold=threshold, weight=1.5), inputs
    )


def test_keeps_the_contract_of_a_torch_operator():
    q, k, v = qkv(1, 2, 5, 6)
    state = module.mask_state(0.1)
    bias = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    for logits_bias in (None, bias):
        library.opcheck(module._masked_softmax, (q, k, v, logits_bias, state))


@pytest.mark.parametrize(
    "shape", [(1, 3, 5, 6), (3, 5, 6), (5, 6), (2, 3, 5, 6), (2, 1, 1, 6), (3, 5, 1)]
)
@pytest.mark.parametrize("threshold", [0.0, 0.1, "1/N"])
def test_equals_the_definition_with_a_bias_of_the_logits(shape, threshold, tiling):
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(shape, dtype=torch.float64, generator=generator)
    inputs = [*qkv(2, 3, 5, 6), bias.requires_grad_()]
    out = masked_softmax_attention(*inputs, threshold=threshold)
    expected = naive_masked_softmax_attention(*inputs, threshold=threshold)
    assert_close(out, expected)
    assert_close(grads_of(out, inputs), grads_of(expected, inputs))
    without = masked_softmax_attention(*inputs[:3], threshold=threshold)
    # Softmax does not see what is the same for all keys.
    assert torch.allclose(out, without) == (shape[-1] == 1)


def test_no_tokens_give_no_output():
    q, k, v = qkv(tokens=0, keys=4)
    assert masked_softmax_attention(q, k, v).shape == (2, 3, 0, 5)
    q, k, v = qkv(tokens=4, keys=0)
    out, density = masked_softmax_attention(q, k, v, return_density=True)
    assert_close(out, torch.zeros(2, 3, 4, 5, dtype=torch.float64))
    assert density == 0
    assert [grad.shape for grad in grads_of(out, [q, k, v])] == [
        q.shape,
        k.shape,
        v.shape,
    ]


def test_rows_without_survivors_are_not_computed_again(monkeypatch):
    """The backward pass multiplies the rows with a survivor and no others."""
    monkeypatch.setattr(module, "_TILE_CPU", 64)
    q, k, v = qkv(1, 2, 40, dims=8)
    with torch.no_grad():
        q[:, 0, 5:] *= 1e-3  # head 0: five sharp rows
        q[:, 0, :5] *= 50.0
        q[:, 1] *= 1e-3  # head 1: none
    out = masked_softmax_attention(q, k, v, threshold=0.5)
    rows = []
    monkeypatch.setattr(
        module._Tiles,
        "probabilities",
        lambda self, heads, of, original=module._Tiles.probabilities: (
            rows.append(self.q[heads, of].shape[:2]),
            original(self, heads, of),
        )[1],
    )
    grad_q, *_ = grads_of(out, [q, k, v])
    assert rows == [(1, 5)]
    assert grad_q[:, 0, :5].abs().min() > 0
    assert not grad_q[:, 0, 5:].any() and not grad_q[:, 1].any()


# -- the penalty -----------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.6])
def test_penalty_is_the_gradient_of_the_explicit_loss(threshold, tiling):
    inputs = qkv(heads=2, tokens=6, sharpness=2.0)
    out = masked_softmax_attention(
        *inputs, threshold=threshold, weight=0.5, penalty=0.3
    )
    plain = masked_softmax_attention(*inputs, threshold=threshold, weight=0.5)
    assert_close(out, plain, atol=0, rtol=0)  # the output is not touched
    expected, mask, total = entry_by_entry(*inputs, threshold)
    grads = torch.autograd.grad(out.sum(), inputs)
    expected_grads = torch.autograd.grad(0.5 * expected.sum() + 0.3 * total, inputs)
    assert_close(grads, expected_grads)
    if not mask.all():  # all of P sums to one and feels no penalty
        without = torch.autograd.grad(plain.sum(), inputs)
        assert (grads[0] - without[0]).abs().max() > 1e-3


def test_a_step_along_the_penalty_lowers_what_survives():
    q, k, v = qkv(1, 1, 30, sharpness=3.0)
    mass = []
    for _ in range(20):
        out, _ = masked_softmax_attention(
            q, k, torch.ones_like(v), threshold=0.1, penalty=1.0, return_density=True
        )
        mass.append(out[..., 0].sum().item())
        (grad,) = torch.autograd.grad(0.0 * out.sum(), q)
        with torch.no_grad():
            q -= 2.0 * grad
    assert mass[-1] < 0.8 * mass[0]


# -- precision, compilation, checkpointing, memory -------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    inputs = [t.detach().to(dtype).requires_grad_() for t in qkv(tokens=300)]
    exact = [t.detach().float().requires_grad_() for t in inputs]
    out = masked_softmax_attention(*inputs)
    expected = masked_softmax_attention(*exact)
    assert out.dtype == torch.float32
    assert_close(out, expected)
    expected_grads = [grad.to(dtype) for grad in grads_of(expected, exact)]
    assert_close(list(grads_of(out, inputs)), expected_grads)


def test_autocast_reaches_neither_pass():
    inputs = qkv(tokens=50, dtype=torch.float32)
    out = masked_softmax_attention(*inputs)
    grads = grads_of(out, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = masked_softmax_attention(*inputs)
        assert_close(inside, out, rtol=0, atol=0)
        assert_close(grads_of(inside, inputs), grads, rtol=0, atol=0)


EDGES = itertools.product(
    ["zero tokens", "equal tokens", "huge", "tiny", "one token"],
    [torch.float32, torch.float16, torch.bfloat16],
)
SLOW_EDGE = pytest.param("sixteen thousand", torch.float16, marks=pytest.mark.slow)


@pytest.mark.parametrize(("case", "dtype"), [*EDGES, SLOW_EDGE])
@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["branch on", "branch off"])
def test_a_block_stays_finite_at_the_edges(case, dtype, weight):
    """Output and all gradients, in autocast for the half precisions."""
    tokens = {"one token": 1, "sixteen thousand": 16_000}.get(case, 60)
    torch.manual_seed(0)
    x = torch.randn(1, tokens, 8)
    if case == "zero tokens":
        x[:, ::2] = 0.0
    elif case == "equal tokens":
        x[:] = x[:, :1].clone()
    else:
        x *= {"huge": 1e4, "tiny": 1e-6}.get(case, 1.0)
    # No biases: a zero token has zero queries, keys and values.
    block = Attention(8, 1, qkv_bias=False, mask_threshold="1/N")
    block.mixer.set_mask("1/N", weight)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out = block(x)
    out.float().abs().mean().backward()
    values = {"out": out, "x": x.grad}
    values |= {name: p.grad for name, p in block.named_parameters()}
    broken = [name for name, value in values.items() if not value.isfinite().all()]
    assert not broken
    assert 0.0 <= block.mixer.branch.density.item() <= 1.0


def test_shapes_are_inferred_on_the_meta_device():
    with torch.device("meta"):
        block = Attention(8, 2)
        assert block(torch.empty(2, 5, 8)).shape == (2, 5, 8)
        assert block.mixer.branch.density.shape == ()


def test_compiles_whole_and_recompiles_once_when_the_branch_goes_off():
    """A schedule changes the threshold at every step; only its end is a new graph."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    block = Attention(8, 2)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x = torch.randn(2, 30, 8)
    thresholds = [i / 12 for i in range(13)] + [1.0, 1.0]
    for threshold in thresholds:
        block.mixer.set_mask(threshold, 1.0 - threshold / 2)
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
        density = block.mixer.branch.density.item()
        (expected,) = torch.autograd.grad(block(x).square().sum(), x)
        assert_close(grad, expected)
        assert density == block.mixer.branch.density.item()
    assert len(graphs) == 2
    assert "masked_softmax" in graphs[0].code
    assert "masked_softmax" not in graphs[1].code


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.long
def test_inductor_gives_the_gradients_of_eager():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Attention(16, 2, mask_threshold="2/N")
    x = torch.randn(2, 40, 16, requires_grad=True)
    compiled = torch.compile(block, dynamic=True)
    for tokens in (40, 33):
        inputs = [x, *block.parameters()]
        part = x[:, :tokens].contiguous()  # other strides would be another graph
        grads = torch.autograd.grad(compiled(part).square().sum(), inputs)
        expected = torch.autograd.grad(block(part).square().sum(), inputs)
        assert_close(grads, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    block, x = Attention(8, 2), torch.randn(2, 30, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    assert_close(x.grad, expected)


def graph_names(tensor):
    """Names of all nodes in a tensor's autograd graph."""
    names, stack = [], [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            names.append(node.name())
            stack.extend(parent for parent, _ in node.next_functions)
    return sorted(names)


def test_an_off_branch_leaves_the_graph_of_linear_angular_attention():
    x = torch.randn(1, 9, 8, requires_grad=True)
    linear = graph_names(Attention(8, 2, type="linear_angular")(x))
    block = Attention(8, 2)
    assert len(graph_names(block(x))) > len(linear)
    block.mixer.set_mask(1.0)
    assert graph_names(block(x)) == linear


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory"
)
def test_memory_does_not_grow_with_the_square_of_the_tokens():
    """16,000 tokens: one matrix of all pairs would take 1 GB; the naive form 5."""
    inputs = qkv(1, 1, 16_000, dims=8, values=8, dtype=torch.float32, sharpness=3.0)
    small = qkv(1, 1, 500, dims=8, values=8, dtype=torch.float32)
    grads_of(masked_softmax_attention(*small, threshold="4/N"), small)  # warm up

    with PeakMemory() as peak:
        out, density = masked_softmax_attention(
            *inputs, threshold="4/N", return_density=True
        )
        grads_of(out, inputs)
    assert 0.001 < density < 0.2
    assert peak.bytes < 100 * 2**20
