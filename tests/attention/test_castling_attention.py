"""The attention blocks: the released form, the mask state, deployment."""

import copy
import logging
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from mmcastling.attention import (
    MIXERS,
    Attention,
    CastlingMixer,
    LinearAngularMixer,
    TokenConv,
)
from mmcastling.attention.local_conv import split_qkv


def released_block(block, x, threshold):
    """The released block's order of operations, written out."""
    batch, tokens, channels = x.shape
    heads, dims = block.num_heads, channels // block.num_heads
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
    kernel = block.mixer.local_conv.weight  # (h, 1, 9, 1)
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
    return Attention(24, 3, **options)


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
        attention.mixer.set_mask(*state)
        assert_close(attention(x), deployed(x), atol=0, rtol=0)


def test_an_off_branch_computes_nothing(monkeypatch):
    attention, x = block(), tokens(1, 9, 24)

    def fail(*_, **__):
        raise AssertionError("the branch was computed")

    monkeypatch.setattr("mmcastling.attention.castling.masked_softmax_with_state", fail)
    attention.mixer.set_mask(1.0)
    attention(x)
    with pytest.raises(AssertionError, match="was computed"):
        attention.mixer.set_mask(0.5)
        attention(x)


def test_density_follows_the_last_training_forward():
    attention, x = block(mask_threshold=0.0), tokens(2, 50, 24)
    branch = attention.mixer.branch
    attention(x)
    assert_close(branch.density.item(), 1.0)
    branch.set(0.02)
    attention.eval()(x)
    assert_close(branch.density.item(), 1.0)  # evaluation does not count
    attention.train()(x)
    assert 0.0 < branch.density.item() < 1.0
    branch.set(1.0)
    attention(x)
    assert branch.density.item() == 0.0


def test_the_branch_owns_no_state_that_a_checkpoint_sees():
    attention = block()
    before = attention.state_dict()
    attention.mixer.set_mask("4/N", 0.5)
    attention.switch_to_deploy()
    assert list(attention.state_dict()) == list(before)
    assert list(attention.buffers()) == []
    Attention(24, 3, type="linear_angular").load_state_dict(before)


def test_deploying_twice_is_deploying_once_and_setting_a_mask_is_refused():
    attention = block()
    attention.switch_to_deploy()
    attention.switch_to_deploy()
    mixer = attention.mixer
    assert mixer.deploy and mixer.branch is None and not mixer.mask_is_on
    with pytest.raises(RuntimeError, match="removed by switch_to_deploy"):
        mixer.set_mask(0.5)
    assert block(deploy=True).mixer.branch is None


def test_softmax_weights_of_a_vision_transformer_load_by_name():
    softmax = block(type="softmax").state_dict()
    assert set(softmax) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    missing = block().load_state_dict(softmax, strict=False)
    assert missing.missing_keys == ["mixer.local_conv.weight"]
    assert missing.unexpected_keys == []


def test_softmax_block_is_multi_head_attention():
    attention, x = block(type="softmax"), tokens(2, 10, 24)
    reference = nn.MultiheadAttention(24, 3, batch_first=True)
    reference.in_proj_weight.data = attention.qkv.weight.data
    reference.in_proj_bias.data = attention.qkv.bias.data
    reference.out_proj.weight.data = attention.proj.weight.data
    reference.out_proj.bias.data = attention.proj.bias.data
    assert_close(attention(x), reference(x, x, x, need_weights=False)[0])


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(MIXERS)),
    conv=st.sampled_from(["token", "grid", None, dict(type="grid", kernel_size=5)]),
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    extra=st.integers(0, 2),
)
def test_any_grid_with_or_without_class_token(kind, conv, batch, height, width, extra):
    attention = Attention(12, 3, type=kind, local_conv=conv)
    x = tokens(batch, extra + height * width, 12).requires_grad_()
    y = attention(x, (height, width))
    assert y.shape == x.shape
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert all(p.grad is not None for p in attention.parameters())


def test_token_conv_has_one_kernel_per_head_and_no_bias():
    conv = MIXERS["softmax"](6, 64, local_conv="token").local_conv
    assert type(conv) is TokenConv
    assert sum(p.numel() for p in conv.parameters()) == 9 * 6


def test_grid_conv_sees_the_grid_and_not_the_class_token():
    mixer = MIXERS["softmax"](2, 4, local_conv="grid")
    conv, v = mixer.convolve, torch.zeros(1, 2, 1 + 3 * 5, 4)
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
        (lambda: Attention(25, 3), "25 is not a multiple of num_heads 3"),
        (lambda: block(mask_threshold=1.5), r"1\.5 is outside \[0, 1\]"),
        (lambda: block(local_conv="line"), "'line' is not known.*grid"),
        (lambda: block(local_conv=dict(type="token", kernel_size=4)), "4 must be.*odd"),
        (lambda: block(reference_tokens=0), "reference_tokens 0"),
        (
            lambda: block(form="landmarks", center_keys=True),
            "center_keys is for the other forms",
        ),
        (lambda: block(center_keys="false"), "center_keys 'false' must be True or Fal"),
        (lambda: block(norm_output="no"), "norm_output 'no' must be True or False"),
        (lambda: block().mixer.set_mask(0.1, -1.0), r"weight -1\.0"),
        (lambda: block(local_conv="grid")(tokens(1, 4, 24)), "without their grid"),
        (lambda: block(local_conv="grid")(tokens(1, 4, 24), (3, 3)), "only 4"),
        (lambda: block(type="mean"), "'mean' is not known: choose one of"),
        (lambda: block(window=7), "unexpected keyword argument 'window'"),
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
    options = dict(embed_dims=32, num_heads=2, layer_scale_init_value=0.1, type=kind)
    attention = Attention(proj_drop=0.5, **options).eval()
    with torch.no_grad():
        attention.gamma1.weight.normal_()
    if kind == "castling":
        attention.mixer.set_mask(1.0)
    x = tokens(2, 9, 32)
    expected = attention(x)
    attention.switch_to_deploy()
    attention.switch_to_deploy()
    assert_close(attention(x), expected)
    assert_close(attention.train()(x), expected)  # no dropout is left
    assert "gamma1.weight" not in attention.state_dict()
    built = Attention(deploy=True, **options)
    built.load_state_dict(attention.state_dict())
    assert_close(built(x), expected)


def test_mixing_leaves_tokens_outermost_so_that_heads_merge_without_a_copy():
    mixer = LinearAngularMixer(4, 16)
    q, k, v = split_qkv(tokens(1, 50, 3 * 64), 4)
    y = mixer(q, k, v)
    assert y.transpose(1, 2).is_contiguous()
    assert_close(y, mixer(*(t.contiguous() for t in (q, k, v))))


def test_the_state_of_the_branch_is_copied_and_pickled_with_its_mixer():
    mixer = CastlingMixer(2, 4)
    mixer.set_mask("4/N", 0.5, 0.25)
    mixer(*(tokens(1, 2, 9, 4, seed=i) for i in range(3)))
    for copied in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert copied.branch is not mixer.branch
        assert copied.branch.density.item() == mixer.branch.density.item() > 0
        copied.set_mask(1.0)
        mask = mixer.branch
        assert (str(mask.threshold), mask.weight, mask.penalty) == ("4/N", 0.5, 0.25)
        assert mask.is_on and not copied.mask_is_on


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("CastlingAttention", r"Attention\(embed_dims, num_heads, type='castling'\)"),
        ("PerformerAttention", "type='performer'"),
        ("ReLULinearMixer", r"MIXERS\['relu_linear'\]"),
        ("TokenAttention", "Attention$"),
        ("unit_rows", "l2_normalize"),
    ],
)
def test_names_of_earlier_releases_say_what_to_use(name, instead):
    with pytest.raises(ImportError, match=f"{name} is gone: use .*{instead}"):
        exec(f"from mmcastling.attention import {name}")


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("grad", [False, True])
def test_what_a_hook_saw_of_the_convolution_stays_as_it_was(name, grad):
    mixer = MIXERS[name](2, 8, local_conv="grid", norm_output=True).eval()
    mixer.switch_to_deploy()
    seen = []
    mixer.local_conv.register_forward_hook(lambda *a: seen.append((a[2], a[2].clone())))
    q, k, v = torch.randn(3, 1, 2, 2**14 + 64, 8)  # more tokens than are taken at once
    values = v.clone()
    with torch.set_grad_enabled(grad):
        mixer(q, k, v, (257, 64)) if name != "softmax" else mixer(
            *(x[:, :, :64] for x in (q, k, v)), (8, 8)
        )
    assert_close(*seen[0], rtol=0, atol=0)
    assert_close(v, values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("saved", "loaded", "named"),
    [
        (dict(form="landmarks"), dict(form="landmarks"), None),
        (dict(form="landmarks", landmarks=4), dict(form="landmarks"), "'landmarks': 4"),
        (dict(center_keys=True), {}, "'center_keys': True"),
        (dict(form="average"), dict(norm_output=False), "'form': 'average'"),
        (dict(reference_tokens=9), {}, "'reference_tokens': 9"),
        (dict(type="softmax"), dict(norm_output=False), None),
    ],
)
def test_weights_say_what_they_were_trained_to_compute(saved, loaded, named, caplog):
    options = dict(local_conv=None)
    kind = saved.pop("type", "castling")
    before, after = (
        nn.Sequential(*(Attention(24, 3, kind, **options, **more) for _ in range(2)))
        for kind, more in ((kind, saved), ("castling", loaded))
    )
    with caplog.at_level(logging.WARNING, "mmcastling"):
        after.load_state_dict(before.state_dict())
    said = [r.getMessage() for r in caplog.records if "saved with" in r.getMessage()]
    assert len(said) == (named is not None)
    assert all(named in text and "weights of 0.mixer were" in text for text in said)
