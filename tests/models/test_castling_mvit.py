"""CastlingMViT: mmpretrain's MViTv2, castled, at any image size."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmpretrain.models.backbones import MViT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mmcastling.analysis import count_model_macs
from mmcastling.attention import CastlingMixer, LinearAngularMixer
from mmcastling.models import CastlingMViT
from mmcastling.models.mvit_blocks import SoftmaxMultiScaleAttention
from mmcastling.verbs import castling_modules, set_mask

# Blocks of 8, 16, 32, 32 channels in 1, 2, 4, 4 heads; 1 and 2 downsample.
TINY = dict(embed_dims=8, num_layers=4, num_heads=1, downscale_indices=[1, 2])
SOFTMAX = dict(type="softmax")


def mvit(**options):
    torch.manual_seed(0)
    return CastlingMViT(**{**dict(arch=TINY, img_size=32), **options})


def image(height=32, width=32, batch=2):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1)
    )


# ------------------------------------------------------------------------ structure


@pytest.mark.parametrize(("arch", "published"), [("tiny", 4.51), ("base", 9.82)])
def test_cost_with_mlp_convolution_meets_the_published_one(arch, published):
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = CastlingMViT(arch, ffn_conv=5, deploy=True)
        macs = count_model_macs(backbone, (224, 224)).macs
    assert macs / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("ffn_conv", [0, 5])
def test_cost_is_what_the_structure_says(ffn_conv):
    """Counted by hand: products of every layer of the tiny size at 224x224."""
    depths = [1, 2, 5, 2]
    total, c_in = 56 * 56 * 7 * 7 * 3 * 96, 96
    for scale, depth in enumerate(depths):
        c, n_out = 96 << scale, (56 >> scale) ** 2
        for i in range(depth):
            down = scale > 0 and i == 0
            n, c_in = (4 * n_out, c // 2) if down else (n_out, c)
            total += n * c_in * 3 * c + 3 * 9 * n * c  # qkv and its poolings
            total += 2 * n * c * 96 + 9 * n * c  # heads of 96; 9 taps on the values
            total += down * (9 * n_out * c + n * c_in * c)  # pool_out, skip
            total += n_out * c * c + 8 * n_out * c * c  # proj, MLP
            total += ffn_conv**2 * n_out * 4 * c
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = CastlingMViT("tiny", ffn_conv=ffn_conv, deploy=True)
        assert count_model_macs(backbone, (224, 224)).macs == total


@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
def test_softmax_twin_has_the_cost_and_parameters_of_the_original(arch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = count_model_macs(CastlingMViT(arch, attention=SOFTMAX), (224, 224))
        original = count_model_macs(MViT(arch), (224, 224))
    assert (twin.macs, twin.params) == (original.macs, original.params)


@pytest.mark.parametrize("options", [{}, dict(dim_mul_in_attention=False)])
@pytest.mark.parametrize("absolute", [False, True])
def test_softmax_twin_equals_mmpretrain_with_its_weights(options, absolute):
    torch.manual_seed(0)
    options = dict(options, use_abs_pos_embed=absolute)
    original = MViT(TINY, img_size=32, **options)
    original.eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    twin = mvit(attention=SOFTMAX, **options).eval()
    twin.load_state_dict(original.state_dict())
    for size in [(32, 32), (40, 72)]:
        assert_close(twin(image(*size)), original(image(*size)))


def test_softmax_weights_load_into_the_castled_backbone():
    castled = mvit(ffn_conv=5)
    result = castled.load_state_dict(MViT(TINY, img_size=32).state_dict(), strict=False)
    assert all(".rel_pos_" in key for key in result.unexpected_keys)
    new = ("local_conv.weight", "dwconv.weight", "pool_out.weight", "norm_out.")
    assert all(any(part in key for part in new) for key in result.missing_keys)


def test_relative_positions_of_another_image_size_are_resized_at_load():
    small, large = mvit(attention=SOFTMAX), mvit(img_size=(48, 96), attention=SOFTMAX)
    for name, parameter in small.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.constant_(parameter, 2.0)
    large.load_state_dict(small.state_dict())
    first = large.blocks[0].attn
    assert isinstance(first, SoftmaxMultiScaleAttention)
    assert first.rel_pos_h.shape == (23, 8) and first.rel_pos_w.shape == (47, 8)
    assert_close(first.rel_pos_w.detach(), torch.full((47, 8), 2.0))


def test_attention_per_scale():
    linear = dict(type="linear_angular")
    backbone = mvit(attention=[linear, None, dict(mask_threshold="4/N")])
    kinds = [type(block.attn.mixer) for block in backbone.blocks]
    # The block that leaves a scale mixes on its grid and belongs to it.
    castling = CastlingMixer
    assert kinds == [LinearAngularMixer, LinearAngularMixer, castling, castling]
    assert str(backbone.blocks[3].attn.mixer.branch.threshold) == "4/N"
    backbone.load_state_dict(mvit().state_dict())


# ---------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
def test_every_size_has_its_shapes_on_rectangles(arch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = CastlingMViT(
            arch, ffn_conv=5, out_indices=(0, 1, 2, 3), deploy=True
        ).eval()
        for height, width in [(224, 224), (208, 304)]:
            outs = backbone(torch.empty(1, 3, height, width))
            for i, out in enumerate(outs):
                size = (-(-height // (4 << i)), -(-width // (4 << i)))
                assert out.shape == (1, 96 << i, *size)


@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
def test_every_size_learns_and_deploys(arch):
    torch.manual_seed(0)
    backbone = CastlingMViT(arch, ffn_conv=5, attention=dict(mask_threshold="1/N"))
    (backbone(image(64, 64))[0] ** 3).sum().backward()
    assert [n for n, p in backbone.named_parameters() if not p.grad.any()] == []
    with torch.no_grad():
        undecayed = backbone(image(64, 96))[0]
        set_mask(backbone, 1.0)
        decayed = backbone(image(64, 96))[0]
        backbone.switch_to_deploy()
        deployed = backbone(image(64, 96))[0]
    assert (deployed - decayed).abs().max() <= 1e-5 * decayed.abs().max()
    assert (undecayed - decayed).abs().max() > 1e-3


def test_initialisation_by_config():
    """mmpretrain's attention expects relative positions when it initialises."""
    for attention in (None, SOFTMAX):
        for rel_pos in (True, False):
            backbone = mvit(
                attention=attention,
                rel_pos_spatial=rel_pos,
                init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
            )
            backbone.init_weights()
            assert backbone.blocks[0].attn.qkv.weight.std() < 0.03


# ------------------------------------------------------------------- construction


# ---------------------------------------------------------------------- detectors


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["castling", "softmax"])
def test_detector_config_trains_and_predicts(root, attention):
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = Config.fromfile(root / f"configs/mask_rcnn_{attention}_mvit_t_coco.py")
    cfg.model.backbone.arch = dict(TINY, downscale_indices=[1, 2, 3])
    cfg.model.neck.in_channels = [8, 16, 32, 64]
    cfg.model.roi_head.bbox_head.fc_out_channels = 32  # heads are not at issue
    cfg.model.train_cfg.rcnn.sampler.num = 16
    cfg.model.train_cfg.rpn_proposal.max_per_img = 20
    cfg.model.test_cfg.rpn.max_per_img = 20
    torch.manual_seed(0)
    detector = MMENGINE_MODELS.build(cfg.model)
    hooks = [hook["type"] for hook in cfg.custom_hooks]
    assert hooks == (["MaskDecayHook"] if attention == "castling" else [])
    wrapper = build_optim_wrapper(detector, cfg.optim_wrapper)
    batch = demo_mm_inputs(2, [(3, 128, 128)] * 2, num_classes=80, with_mask=True)
    data = detector.data_preprocessor(batch, training=True)
    loss, _ = detector.parse_losses(detector(**data, mode="loss"))
    assert loss.isfinite()
    wrapper.backward(loss)
    backbone = detector.backbone
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []
    wrapper.step()
    # All but those that attend on the first scale, where there are too many pairs.
    castled = [name for name, _ in castling_modules(backbone)]
    expected = ["blocks.2.attn.mixer", "blocks.3.attn.mixer"]
    assert castled == (expected if attention == "castling" else [])
    detector.eval()
    with torch.no_grad():
        assert len(detector.test_step(batch)) == 2
        pyramid = detector.extract_feat(image(128, 128))
    assert [level.shape[-1] for level in pyramid] == [32, 16, 8, 4, 2]
