"""The attention blocks: the released form, the mask state, deployment."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mmcastling.attention import (
    ATTENTIONS,
    CastlingAttention,
    GridConv,
    LinearAngularAttention,
    SoftmaxAttention,
    TokenConv,
    build_attention,
)


def released_block(block, x, threshold):
    """The released block's order of operations, written out."""
    batch, tokens, channels = x.shape
    heads, dims = block.num_heads, block.head_dims
    projected = x @ block.qkv.weight.T + block.qkv.bias
    q, k, v = (
        part.reshape(batch, tokens, heads, dims).transpose(1, 2)
        for part in projected.chunk(3, dim=-1)
    )
    y = 0.5 * v
    q_unit = q / q.norm(dim=-1, keepdim=True)
    k_unit = k / k.norm(dim=-1, keepdim=True)
    y = y + q_unit @ (k_unit.transpose(-2, -1) @ v) / math.pi
    if threshold is not None:
        p = (q @ k.transpose(-2, -1) / math.sqrt(dims)).softmax(-1)
        y = (p * (p > threshold)) @ v + y
    y = y / y.norm(dim=-1, keepdim=True)
    conv = torch.zeros_like(v)
    kernel = block.local_conv.weight  # (h, 1, 9, 1)
    for tap in range(9):
        for i in range(tokens):
            if 0 <= i + tap - 4 < tokens:
                conv[:, :, i] += kernel[:, 0, tap] * v[:, :, i + tap - 4]
    y = (y + conv).transpose(1, 2).reshape(batch, tokens, channels)
    return y @ block.proj.weight.T + block.proj.bias


def tokens(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(**options):
    torch.manual_seed(1)
    return CastlingAttention(24, 3, **options)


def test_equals_the_released_block_in_training_and_deployed_form():
    attention, x = block(), tokens(2, 50, 24)
    assert_close(attention(x), released_block(attention, x, 0.02), atol=1e-5, rtol=0)
    attention.switch_to_deploy()
    assert_close(attention(x), released_block(attention, x, None), atol=1e-5, rtol=0)


def test_the_branch_changes_the_output_until_it_is_off():
    attention, x = block(), tokens(2, 50, 24)
    deployed = copy.deepcopy(attention)
    deployed.switch_to_deploy()
    assert (attention(x) - deployed(x)).abs().max() > 1e-3
    for state in [(1.0,), (0.02, 0.0)]:
        attention.set_mask(*state)
        assert_close(attention(x), deployed(x), atol=0, rtol=0)


def test_an_off_branch_computes_nothing(monkeypatch):
    attention, x = block(), tokens(1, 9, 24)

    def fail(*_, **__):
        raise AssertionError("the branch was computed")

    monkeypatch.setattr("mmcastling.attention.castling.masked_softmax_with_state", fail)
    attention.set_mask(1.0)
    attention(x)
    with pytest.raises(AssertionError, match="was computed"):
        attention.set_mask(0.5)
        attention(x)


def test_density_follows_the_last_training_forward():
    attention, x = block(mask_threshold=0.0), tokens(2, 50, 24)
    attention(x)
    assert_close(attention.mask_density.item(), 1.0)
    attention.set_mask(0.02)
    attention.eval()(x)
    assert_close(attention.mask_density.item(), 1.0)  # evaluation does not count
    attention.train()(x)
    assert 0.0 < attention.mask_density.item() < 1.0
    attention.set_mask(1.0)
    attention(x)
    assert attention.mask_density.item() == 0.0


def test_the_branch_owns_no_state_that_a_checkpoint_sees():
    attention = block()
    before = attention.state_dict()
    attention.set_mask("4/N", 0.5)
    attention.switch_to_deploy()
    assert list(attention.state_dict()) == list(before)
    assert list(attention.buffers()) == []
    LinearAngularAttention(24, 3).load_state_dict(before)


def test_deploying_twice_is_deploying_once_and_setting_a_mask_is_refused():
    attention = block()
    attention.switch_to_deploy()
    attention.switch_to_deploy()
    assert attention.deploy and not attention.mask_is_on
    with pytest.raises(RuntimeError, match="pruned"):
        attention.set_mask(0.5)
    assert not block(deploy=True).mask_is_on


def test_softmax_weights_of_a_vision_transformer_load_by_name():
    names = set(SoftmaxAttention(24, 3).state_dict())
    assert names == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    missing = block().load_state_dict(
        SoftmaxAttention(24, 3).state_dict(), strict=False
    )
    assert missing.missing_keys == ["local_conv.weight"]
    assert missing.unexpected_keys == []


def test_softmax_block_is_multi_head_attention():
    attention, x = SoftmaxAttention(24, 3), tokens(2, 10, 24)
    reference = nn.MultiheadAttention(24, 3, batch_first=True)
    reference.in_proj_weight.data = attention.qkv.weight.data
    reference.in_proj_bias.data = attention.qkv.bias.data
    reference.out_proj.weight.data = attention.proj.weight.data
    reference.out_proj.bias.data = attention.proj.bias.data
    assert_close(attention(x), reference(x, x, x, need_weights=False)[0])


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(ATTENTIONS)),
    conv=st.sampled_from(["token", "grid", None, dict(type="grid", kernel_size=5)]),
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    extra=st.integers(0, 2),
)
def test_any_grid_with_or_without_class_token(kind, conv, batch, height, width, extra):
    spec = dict(type=kind, local_conv=conv)
    attention = build_attention(spec, embed_dims=12, num_heads=3)
    x = tokens(batch, extra + height * width, 12).requires_grad_()
    y = attention(x, (height, width))
    assert y.shape == x.shape
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None for p in attention.parameters())


def test_token_conv_has_one_kernel_per_head_and_no_bias():
    conv = TokenConv(6, 64)
    assert sum(p.numel() for p in conv.parameters()) == 9 * 6


def test_grid_conv_sees_the_grid_and_not_the_class_token():
    conv, v = GridConv(2, 4), torch.zeros(1, 2, 1 + 3 * 5, 4)
    v[:, :, 1 + 1 * 5 + 2] = 1.0  # row 1, column 2
    touched = conv(v, (3, 5)).abs().sum((0, 1, 3)) > 0
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[0:3, 1:4] = True
    assert not touched[0]
    assert_close(touched[1:].reshape(3, 5), expected)
    v[:, :, 0] = 100.0
    assert conv(v, (3, 5))[:, :, 0].abs().max() == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CastlingAttention(25, 3), "25 is not a multiple of num_heads 3"),
        (lambda: block(mask_threshold=1.5), r"1\.5 is outside \[0, 1\]"),
        (lambda: block(local_conv="line"), "'line' is not known.*grid"),
        (lambda: block(local_conv=dict(type="token", kernel_size=4)), "4 must be.*odd"),
        (lambda: block(reference_tokens=0), "reference_tokens 0"),
        (lambda: block().set_mask(0.1, -1.0), r"weight -1\.0"),
        (lambda: block(local_conv="grid")(tokens(1, 4, 24)), "without their grid"),
        (lambda: block(local_conv="grid")(tokens(1, 4, 24), (3, 3)), "only 4"),
        (
            lambda: build_attention(dict(type="mean"), embed_dims=8, num_heads=2),
            "'mean' is not known: choose one of",
        ),
        (
            lambda: build_attention(dict(window=7), embed_dims=8, num_heads=2),
            "unexpected keyword argument 'window'",
        ),
    ],
)
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bfloat16_autocast_keeps_norms_in_float32_and_gradients_finite():
    attention, x = block(), 1e3 * tokens(2, 50, 24)
    x[0, 3] = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    for parameter in attention.parameters():
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("kind", ["castling", "linear_angular", "softmax"])
def test_deployment_folds_the_layer_scale_into_the_projection(kind):
    options = dict(embed_dims=32, num_heads=2, layer_scale_init_value=0.1)
    attention = build_attention(dict(type=kind, proj_drop=0.5, **options)).eval()
    with torch.no_grad():
        attention.gamma1.weight.normal_()
    if kind == "castling":
        attention.set_mask(1.0)
    x = tokens(2, 9, 32)
    expected = attention(x)
    attention.switch_to_deploy()
    attention.switch_to_deploy()
    assert_close(attention(x), expected)
    assert_close(attention.train()(x), expected)  # no dropout is left
    assert "gamma1.weight" not in attention.state_dict()
    if kind == "castling":
        built = build_attention(dict(type=kind, **options), deploy=True)
        built.load_state_dict(attention.state_dict())
        assert_close(built(x), expected)


def test_mixing_leaves_tokens_outermost_so_that_heads_merge_without_a_copy():
    attention = LinearAngularAttention(64, 4).eval()
    q, k, v = attention.qkv(tokens(1, 50, 64)).view(1, 50, 3, 4, 16).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    local = attention.local_conv(v)
    y = attention.mix_to_unit(q, k, v, plus=local)
    assert y.transpose(1, 2).is_contiguous()
    dense = (t.contiguous() for t in (q, k, v))
    assert_close(y, attention.mix_to_unit(*dense) + local)
