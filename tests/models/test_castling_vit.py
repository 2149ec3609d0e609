"""CastlingViT: mmpretrain's plain transformer, castled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmpretrain.models.backbones import DistilledVisionTransformer, VisionTransformer
from torch.testing import assert_close

from mmcastling.models import CastlingViT
from mmcastling.models.conv_ffn import ConvFFN
from mmcastling.verbs import set_mask, switch_to_deploy

TINY = dict(embed_dims=24, num_layers=3, num_heads=3, feedforward_channels=48)


def vit(**options):
    torch.manual_seed(0)
    defaults = dict(arch=TINY, img_size=32, patch_size=8, out_type="featmap")
    return CastlingViT(**{**defaults, "with_cls_token": False, **options})


def image(height=32, width=32, batch=2):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(
    ("arch", "params"),
    # DeiT's sizes plus 9 x heads convolution weights per layer, without the head.
    [
        ("tiny", 5_524_416 + 12 * 9 * 3),
        ("small", 21_665_664 + 12 * 9 * 6),
        ("base", 85_798_656 + 12 * 9 * 12),
        ("large", 303_301_632 + 24 * 9 * 16),
    ],
)
def test_archs_have_the_sizes_of_deit(arch, params):
    with torch.device("meta"):
        backbone = CastlingViT(arch)
    assert sum(p.numel() for p in backbone.parameters()) == params


def test_softmax_twin_equals_mmpretrain_with_its_weights():
    torch.manual_seed(0)
    original = VisionTransformer(arch=TINY, img_size=32, patch_size=8)
    original.eval()
    torch.nn.init.normal_(original.pos_embed)
    twin = CastlingViT(
        arch=TINY, img_size=32, patch_size=8, attention=dict(type="softmax")
    ).eval()
    twin.load_state_dict(original.state_dict())
    for size in [(32, 32), (40, 72)]:
        assert_close(twin(image(*size))[0], original(image(*size))[0])


def test_softmax_weights_load_into_the_castled_backbone():
    original = VisionTransformer(arch=TINY, img_size=32, patch_size=8)
    castled = CastlingViT(arch=TINY, img_size=32, patch_size=8)
    result = castled.load_state_dict(original.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all(key.endswith("local_conv.weight") for key in result.missing_keys)


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(8, 61),
    width=st.integers(8, 61),
    stem=st.sampled_from(["patch", "conv"]),
    ffn_conv=st.sampled_from([0, 3]),
    conv=st.sampled_from(["token", "grid"]),
    cls=st.booleans(),
)
def test_any_image_size(height, width, stem, ffn_conv, conv, cls):
    backbone = vit(
        stem=stem,
        ffn_conv=ffn_conv,
        with_cls_token=cls,
        attention=dict(local_conv=conv),
    )
    (out,) = backbone(image(height, width, 1))
    assert out.shape == (1, 24, -(-height // 8), -(-width // 8))


def test_several_outputs_have_a_norm_each():
    backbone = vit(out_indices=(0, -1))
    first, last = backbone(image())
    assert first.shape == last.shape == (2, 24, 4, 4)
    tokens = first.permute(0, 2, 3, 1)
    assert_close(tokens.mean(-1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    assert_close(tokens.var(-1, unbiased=False), torch.ones(2, 4, 4), atol=1e-3, rtol=0)
    alone = vit(out_indices=-1)
    alone.load_state_dict(backbone.state_dict(), strict=False)
    assert_close(alone(image())[0], last)


def test_layer_scale_is_kept():
    backbone = vit(layer_scale_init_value=1e-5)
    assert_close(backbone.layers[0].attn.gamma1.weight, torch.full((24,), 1e-5))


def test_position_embedding_of_another_size_is_resized_at_load():
    large = vit(img_size=64)
    large.load_state_dict(vit(img_size=32).state_dict())
    assert large.pos_embed.shape == (1, 64, 24)


def test_conv_ffn_starts_as_the_plain_mlp_and_spares_the_class_token():
    torch.manual_seed(0)
    ffn = ConvFFN(8, 16, kernel_size=3)
    x = torch.randn(2, 1 + 4 * 5, 8)
    assert_close(ffn(x, grid=(4, 5)), x + ffn.layers(x))
    torch.nn.init.normal_(ffn.dwconv.weight)
    changed = (ffn(x, grid=(4, 5)) - x - ffn.layers(x)).abs().amax((0, 2))
    assert changed[0] < 1e-6 < 1e-3 < changed[1:].min()


# -- the distillation token ------------------------------------------------------------

DISTILLED = dict(with_cls_token=True, with_dist_token=True)


def test_with_a_distillation_token_the_softmax_twin_is_mmpretrains():
    theirs = DistilledVisionTransformer(arch=TINY, img_size=32, patch_size=8)
    theirs.eval()  # returns None in mmpretrain's backbones
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = vit(**DISTILLED, out_type="cls_token", attention=dict(type="softmax"))
    ours.eval().load_state_dict(theirs.state_dict())
    for size in ((32, 32), (24, 40)):
        ((cls, dist),) = ours(image(*size))
        assert_close((cls, dist), theirs(image(*size))[0], atol=1e-5, rtol=1e-5)
        assert (cls - dist).abs().max() > 0.1


@pytest.mark.parametrize("conv", ["token", "grid"])
def test_a_castled_network_with_a_distillation_token(conv):
    attention = dict(local_conv=conv, mask_threshold="1/N")
    model = vit(**DISTILLED, ffn_conv=3, attention=attention, frozen_stages=1)
    model.init_weights()
    assert model.dist_token.std() > 0.01
    assert not model.dist_token.requires_grad  # frozen with the stem
    assert model.get_layer_depth("backbone.dist_token", "backbone.") == (0, 5)
    (feature,) = model.train()(image(24, 40))
    assert feature.shape == (2, 24, 3, 5)
    set_mask(model.eval(), 1.0)
    deployed = switch_to_deploy(model)
    assert_close(deployed(image(24, 40)), model(image(24, 40)), atol=1e-5, rtol=1e-5)
    built = vit(**DISTILLED, ffn_conv=3, attention=attention, deploy=True)
    built.load_state_dict(deployed.state_dict())


@pytest.mark.parametrize("held", [0, 1, 2])
@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)], ids=["same", "resized"])
def test_positions_of_class_tokens_fit_whatever_the_file_has(held, wanted, size):
    tokens = [
        dict(),
        dict(with_cls_token=True),
        DISTILLED,
    ]
    source, model = vit(**tokens[held]), vit(**tokens[wanted], img_size=size)
    torch.nn.init.normal_(source.pos_embed)
    model.load_state_dict(source.state_dict(), strict=False)
    expected = torch.zeros(1, wanted, 24)
    both = min(held, wanted)
    expected[:, :both] = source.pos_embed[:, :both]
    assert_close(model.pos_embed[:, :wanted], expected)
    grid = source.pos_embed[:, held:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        grid, model.patch_resolution, mode="bicubic"
    )
    assert_close(model.pos_embed[:, wanted:], resized.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(layer_cfgs=dict(attn_drop_rate=0.1)),
            "attn_drop_rate=0.1: the attention",
        ),
        (
            dict(layer_cfgs=[{}, {}, {}, dict(attn_drop_rate=0.2)]),
            "attn_drop_rate=0.2: the attention",
        ),
        (
            dict(ffn_conv=5, layer_cfgs=dict(ffn_type="swiglu_fused")),
            "ffn_type='swiglu_fused' and num_fcs=2",
        ),
        (dict(ffn_conv=5, layer_cfgs=dict(num_fcs=3)), "num_fcs=3: leave one"),
    ],
)
def test_options_of_a_layer_that_could_not_act_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CastlingViT("nano", img_size=32, **options)


@pytest.mark.parametrize("options", [dict(ffn_type="swiglu_fused"), dict(num_fcs=3)])
def test_mlps_of_other_kinds_act_without_a_convolution(options):
    torch.manual_seed(0)
    layer_cfgs = dict(options, layer_scale_init_value=2.0)
    model = CastlingViT("nano", img_size=32, layer_cfgs=layer_cfgs).eval()
    set_mask(model, 1.0)
    switch_to_deploy(model, example=torch.randn(1, 3, 32, 32))
    weights = [n for n in model.state_dict() if n.startswith("layers.0.ffn")]
    assert any("w12" in n or "layers.1.0" in n for n in weights)
