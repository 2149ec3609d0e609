"""The simple feature pyramid: sizes, coverage, gradients, use from mmdet, errors."""

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmcastling.models import ChannelLayerNorm, SimpleFeaturePyramid


def build_small(**kwargs) -> SimpleFeaturePyramid:
    return SimpleFeaturePyramid(**dict(dict(in_channels=8, out_channels=4), **kwargs))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    in_stride=st.sampled_from([8, 16, 32]),
)
def test_every_level_covers_the_input_like_an_fpn(height, width, in_stride):
    neck = build_small(in_stride=in_stride)
    outs = neck([torch.randn(2, 8, height, width)])

    assert neck.strides == (4, 8, 16, 32, 64)
    for stride, out in zip(neck.strides, outs, strict=True):
        size = (ceil(height * in_stride / stride), ceil(width * in_stride / stride))
        assert out.shape == (2, 4, *size)


def test_sizes_are_those_of_mmdets_fpn_on_a_strided_backbone():
    """Anchors and points are laid out from these sizes alone."""
    from mmcv.cnn import ConvModule
    from mmdet.models.necks import FPN

    image = torch.randn(1, 3, 16 * 7, 16 * 5)
    maps, x = [], image
    for stride in (2, 4, 8, 16, 32):
        x = ConvModule(x.shape[1], 8, 3, stride=2, padding=1, act_cfg=None)(x)
        maps += [x] if stride >= 4 else []
    fpn = FPN(in_channels=[8] * 4, out_channels=4, num_outs=5)

    outs = build_small()([maps[2]])

    assert [out.shape for out in outs] == [out.shape for out in fpn(maps)]


def test_coarse_levels_see_the_last_odd_row_and_column():
    neck = build_small(strides=(16, 32, 64), num_extra_levels=0).eval()
    x = torch.randn(1, 8, 5, 5)
    changed = x.clone()
    changed[:, :, -1, -1] += 10

    for before, after in zip(neck([x]), neck([changed]), strict=True):
        assert not torch.allclose(before[:, :, -1, -1], after[:, :, -1, -1])


def test_extra_levels_keep_every_second_position_of_the_last():
    neck = build_small(num_extra_levels=2)
    outs = neck([torch.randn(1, 8, 10, 14)])

    assert neck.strides == (4, 8, 16, 32, 64, 128)
    torch.testing.assert_close(outs[4], outs[3][:, :, ::2, ::2])
    torch.testing.assert_close(outs[5], outs[3][:, :, ::4, ::4])


def test_parameters_are_those_of_the_paper():
    """ViTDet: deconvolutions halve the channels; 1x1 and 3x3 convolutions, no bias."""
    c, d = 16, 12
    stride_4 = (c * (c // 2) * 4 + c // 2) + c + ((c // 2) * (c // 4) * 4 + c // 4)
    stride_8 = c * (c // 2) * 4 + c // 2
    heads = [c // 4, c // 2, c, c]
    convs = sum(n * d + 2 * d + d * d * 9 + 2 * d for n in heads)

    neck = SimpleFeaturePyramid(in_channels=c, out_channels=d)

    assert sum(p.numel() for p in neck.parameters()) == stride_4 + stride_8 + convs


def test_gradients_reach_all_parameters_and_the_input():
    neck = build_small()
    x = torch.randn(1, 8, 3, 5, requires_grad=True)
    sum((out * torch.randn_like(out)).sum() for out in neck([x])).backward()

    assert x.grad.abs().sum() > 0
    for name, param in neck.named_parameters():
        assert param.grad is not None and param.grad.abs().sum() > 0, name


def test_norm_agrees_with_a_loop_over_positions():
    norm = ChannelLayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4)

    out = norm(x)

    assert out.is_contiguous()
    for h in range(3):
        for w in range(4):
            centred = x[:, :, h, w] - x[:, :, h, w].mean(1, keepdim=True)
            std = (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
            expected = centred / std * norm.weight + norm.bias
            torch.testing.assert_close(out[:, :, h, w], expected)


def test_memory_format_is_kept_by_the_norm_and_levels_are_plain():
    x = torch.randn(2, 8, 6, 4)
    last = x.to(memory_format=torch.channels_last)
    norm = ChannelLayerNorm(8)
    assert norm(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm(last), norm(x))
    neck = build_small(num_extra_levels=1)
    for one, other in zip(neck([x]), neck([last]), strict=True):
        assert one.is_contiguous() and other.is_contiguous()  # heads call `.view`
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [False, True])
def test_norm_of_half_precision_maps_is_computed_in_fp32(autocast):
    # At an offset of 200 bf16 resolves steps of 1: the squares of the mean must not be
    # rounded to it.
    x = (200 + torch.randn(2, 64, 3, 3)).bfloat16()
    norm = ChannelLayerNorm(64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = norm(x)

    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, norm(x.float()).bfloat16(), rtol=0, atol=0)


def test_mmdet_builds_it_with_its_default_norm():
    """``type='LN2d'`` could not be found here: the scope is mmdet's."""
    cfg = dict(type="mmcastling.SimpleFeaturePyramid", in_channels=8, out_channels=4)
    with DefaultScope.overwrite_default_scope("mmdet"):
        neck = MODELS.build(cfg)

    norms = [m for m in neck.modules() if isinstance(m, ChannelLayerNorm)]
    assert len(norms) == 2 * 4 + 1  # two per level, one between deconvolutions


def test_batch_norm_can_be_asked_for():
    neck = build_small(norm_cfg=dict(type="BN"))

    assert sum(isinstance(m, nn.BatchNorm2d) for m in neck.modules()) == 9


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(strides=(4, 8, 48)), "stride 48 is not in_stride 16"),
        (dict(strides=(6, 16)), "stride 6 is not in_stride 16"),
        (dict(strides=(0, 16)), "stride 0 is not in_stride 16"),
        (dict(in_stride=14), "stride 4 is not in_stride 14"),
        (dict(strides=(8, 4)), r"rise, got \(8, 4\)"),
        (dict(strides=()), r"rise, got \(\)"),
        (dict(in_channels=6), "in_channels 6 cannot be halved 2 times"),
        (dict(num_extra_levels=-1), "got -1"),
    ],
)
def test_wrong_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_small(**kwargs)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(1, 8, 4, 4), TypeError, "got Tensor"),
        ([torch.zeros(1, 8, 4, 4)] * 2, ValueError, "takes one map, got 2"),
        ([], ValueError, "takes one map, got 0"),
        ([torch.zeros(1, 9, 4, 4)], ValueError, r"\(1, 9, 4, 4\)"),
        ([torch.zeros(1, 16, 8)], ValueError, r"\(1, 16, 8\)"),
        ([None], ValueError, "got NoneType"),
    ],
)
def test_wrong_inputs_are_named(inputs, error, message):
    with pytest.raises(error, match=message):
        build_small()(inputs)
