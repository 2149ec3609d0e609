"""CastlingLeViT: LeViT's pyramid, castled, at any image size."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmpretrain.models.backbones import LeViT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mmcastling.analysis import count_model_macs
from mmcastling.models import CastlingLeViT
from mmcastling.models.levit_blocks import BiasedSoftmaxAttention
from mmcastling.verbs import set_mask

# Stage blocks: 2, 3, 4 heads of 8. Between stages: 4 and 6 heads of 16.
TINY = dict(
    embed_dims=[16, 24, 32], key_dims=[4, 4, 4], num_heads=[2, 2, 4], depths=[1, 1, 1]
)
SOFTMAX = dict(type="softmax")


def levit(**options):
    torch.manual_seed(0)
    defaults = dict(arch=TINY, img_size=64)
    return CastlingLeViT(**{**defaults, **options})


def image(height=64, width=64, batch=2):
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1)
    )


# ------------------------------------------------------------------------ structure


@pytest.mark.parametrize(
    ("arch", "published"), [("128", 0.49), ("192", 0.82), ("256", 1.41), ("384", 2.89)]
)
def test_cost_with_mlp_convolution_meets_the_published_one(arch, published):
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = CastlingLeViT(arch, ffn_conv=5, deploy=True)
        macs = count_model_macs(backbone, (224, 224)).macs
    heads = 2 * 1000 * backbone.embed_dims[-1]  # classes and distillation
    assert (macs + heads) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("arch", "macs"),
    [
        ("128s", 393_612_032),
        ("128", 475_260_928),
        ("192", 808_995_072),
        ("256", 1_394_519_040),
        ("384", 2_866_188_288),
    ],
)
def test_cost_is_what_the_structure_says(arch, macs):
    """Counted by hand: products of every layer, at 14x14, 7x7 and 4x4 tokens."""
    zoo = CastlingLeViT.arch_zoo[arch]
    dims, keys, depths = zoo["embed_dims"], zoo["key_dims"], zoo["depths"]
    tokens = [14 * 14, 7 * 7, 4 * 4]
    widths = [3, dims[0] // 8, dims[0] // 4, dims[0] // 2, dims[0]]
    total = sum(
        (112 >> i) ** 2 * 9 * widths[i] * widths[i + 1] for i in range(len(widths) - 1)
    )
    for i, (c, n, depth) in enumerate(zip(dims, tokens, depths, strict=True)):
        head = c // (c // (2 * keys[i]))
        core = 2 * n * c * head + 9 * n * c  # k v, q (k v), and 9 taps
        total += depth * (3 * n * c * c + core + n * c * c + 4 * n * c * c)
        if i:
            b, before = dims[i - 1], tokens[i - 1]
            total += before * b * 12 * b + 2 * before * 4 * b * 4 * keys[i]
            total += 9 * before * 4 * b + n * 4 * b * c + 4 * n * c * c
    assert total == macs
    with FakeTensorMode(allow_non_fake_inputs=True):
        backbone = CastlingLeViT(arch, deploy=True)
        assert count_model_macs(backbone, (224, 224)).macs == macs


@pytest.mark.parametrize("arch", ["128s", "128", "192", "256", "384"])
def test_softmax_twin_has_the_cost_and_parameters_of_the_original(arch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = count_model_macs(CastlingLeViT(arch, attention=SOFTMAX), (224, 224))
        original = count_model_macs(LeViT(arch), (224, 224))
    assert (twin.macs, twin.params) == (original.macs, original.params)


def test_softmax_twin_equals_mmpretrain_with_its_weights(monkeypatch):
    monkeypatch.setitem(LeViT.arch_zoo, "made-up", TINY)
    torch.manual_seed(0)
    original = LeViT("made-up", img_size=96, out_indices=(0, 1, 2))
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    original(image(96, 96, 4))  # batch statistics
    original.eval()
    twin = levit(img_size=96, attention=SOFTMAX)
    twin.load_state_dict(original.state_dict())
    twin.eval()
    assert_close(twin(image(96, 96))[0], original(image(96, 96))[-1])


def test_biases_depend_on_distance_and_are_resized():
    block = BiasedSoftmaxAttention(8, 8, 4, 2, 2, grid=(4, 6))
    torch.nn.init.normal_(block.attention_biases)
    bias = block.bias((4, 6)).detach().unflatten(1, (4, 6)).unflatten(3, (4, 6))
    table = block.attention_biases.detach().unflatten(1, (4, 6))
    assert_close(bias[:, 3, 5, 1, 2], table[:, 2, 3])
    assert_close(bias[:, 1, 2, 3, 5], table[:, 2, 3])
    assert_close(block.bias((9, 11))[:, 5, 5], table[:, 0, 0])
    assert block.bias((1, 3)).shape == (2, 3, 3)


def test_biases_of_another_image_size_are_resized_at_load():
    small, large = (levit(img_size=n, attention=SOFTMAX) for n in (64, 96))
    for name, parameter in small.named_parameters():
        if name.endswith("attention_biases"):
            torch.nn.init.normal_(parameter)
    large.load_state_dict(small.state_dict())
    before, after = (
        net.stages[0][0].block.attention_biases.unflatten(1, (side, side))
        for net, side in ((small, 4), (large, 6))
    )
    assert_close(after[:, [0, -1]][:, :, [0, -1]], before[:, [0, -1]][:, :, [0, -1]])


# ---------------------------------------------------------------------- behaviour


def test_square_and_rectangle_agree_where_the_image_does():
    """A grid that were passed on transposed would mix other neighbours."""
    backbone = levit(attention=dict(local_conv="grid"), ffn_conv=3).eval()
    tall, wide = image(64, 128), image(64, 128).transpose(2, 3)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            with torch.no_grad():
                module.weight.add_(module.weight.transpose(2, 3).clone())
    assert_close(
        backbone(tall)[0], backbone(wide)[0].transpose(2, 3), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("arch", ["128s", "128", "192", "256", "384"])
def test_every_size_learns_and_deploys(arch):
    torch.manual_seed(0)
    spec = dict(mask_threshold="1/N")
    backbone = CastlingLeViT(arch, ffn_conv=5, attention=spec, out_indices=(0, 1, 2))
    sum((out**3).sum() for out in backbone(image(128, 128))).backward()
    assert [n for n, p in backbone.named_parameters() if not p.grad.any()] == []
    backbone.eval().requires_grad_(False)
    undecayed = backbone(image(208, 304, 1))
    set_mask(backbone, 1.0)
    decayed = backbone(image(208, 304, 1))
    backbone.switch_to_deploy()
    # Folded and not, float32 rounds differently, up to some 1e-5 at this depth; what
    # is folded is exact, so that both are as far from the result in float64.
    exact = backbone.double()(image(208, 304, 1).double())
    for deployed, unfolded, reference in zip(
        backbone.float()(image(208, 304, 1)), decayed, exact, strict=True
    ):
        rounding = (unfolded - reference).abs().max()
        assert rounding <= 1e-4 * reference.abs().max()
        assert (deployed - reference).abs().max() <= 3 * rounding
    sizes = [(13, 19), (7, 10), (4, 5)]
    for before, after, c, size in zip(
        undecayed, decayed, backbone.embed_dims, sizes, strict=True
    ):
        assert after.shape == (1, c, *size) and after.isfinite().all()
        assert (before - after).abs().max() > 1e-3
    assert backbone(image(224, 224, 1))[-1].shape[2:] == (4, 4)


def test_outputs_have_a_norm_each_and_the_last_one_on_demand():
    assert not hasattr(levit(), "norm2")
    backbone = levit(out_indices=(0, -1), final_norm=True)
    for out in backbone(image(96, 96, 4)):
        assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-4, rtol=0)
    assert not hasattr(backbone, "norm1")


def test_norm_eval_keeps_running_statistics():
    backbone = levit(norm_eval=True).train()
    before = backbone.patch_embed.patch_embed[0].bn.running_mean.clone()
    backbone(image())
    assert torch.equal(backbone.patch_embed.patch_embed[0].bn.running_mean, before)
    assert backbone.training


# ------------------------------------------------------------------- construction


# ---------------------------------------------------------------------- detectors


@pytest.mark.parametrize("attention", ["castling", "softmax"])
def test_detector_config_trains_and_predicts(root, attention):
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules

    register_all_modules()
    cfg = Config.fromfile(root / f"configs/retinanet_{attention}_levit_256_coco.py")
    cfg.model.backbone.arch = TINY
    cfg.model.neck.in_channels = [8, 16, 24, 32]
    torch.manual_seed(0)
    detector = MMENGINE_MODELS.build(cfg.model)
    hooks = [hook["type"] for hook in cfg.custom_hooks]
    assert hooks == (["MaskDecayHook"] if attention == "castling" else [])
    wrapper = build_optim_wrapper(detector, cfg.optim_wrapper)
    batch = demo_mm_inputs(2, [(3, 128, 128)] * 2, num_classes=80)
    data = detector.data_preprocessor(batch, training=True)
    loss, _ = detector.parse_losses(detector(**data, mode="loss"))
    assert loss.isfinite()
    wrapper.backward(loss)
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []
    wrapper.step()
    detector.eval()
    with torch.no_grad():
        assert len(detector.test_step(batch)) == 2
        pyramid = detector.extract_feat(image(128, 128))
    assert [level.shape[-1] for level in pyramid] == [16, 8, 4, 2, 1]
