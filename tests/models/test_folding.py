"""Deployment folds norms and factors into layers, and the output stays the same."""

import pytest
import torch
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import FFN
from mmpretrain.models.backbones.mvit import attention_pool
from mmpretrain.models.utils import LayerScale
from torch import nn
from torch.autograd.profiler import profile
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from mmcastling.analysis import count_macs
from mmcastling.attention import fast
from mmcastling.attention.attention import LayerScale as OwnLayerScale
from mmcastling.attention.local_conv import merge_heads, split_heads
from mmcastling.models import CastlingLeViT, CastlingMViT, CastlingViT
from mmcastling.models.conv_ffn import (
    ConvLeViTMLP,
    ConvMViTMLP,
)
from mmcastling.models.mvit_blocks import CastlingMultiScaleAttention
from mmcastling.verbs import set_mask

FAMILIES = {
    "vit": lambda **options: CastlingViT(
        "nano",
        img_size=64,
        patch_size=8,
        out_type="featmap",
        layer_scale_init_value=0.5,
        drop_rate=0.1,
        drop_path_rate=0.2,
        **options,
    ),
    "levit": lambda **options: CastlingLeViT(
        dict(embed_dims=[32, 48], key_dims=[8, 8], num_heads=[2, 3], depths=[2, 1]),
        out_indices=(0, 1),
        out_stem=True,
        drop_path_rate=0.2,
        **options,
    ),
    "mvit": lambda **options: CastlingMViT(
        dict(embed_dims=16, num_layers=4, num_heads=1, downscale_indices=[1, 2]),
        img_size=64,
        drop_path_rate=0.2,
        out_indices=(0, 1, 2),
        **options,
    ),
}
FOLDED = {"vit": (LayerScale, OwnLayerScale), "levit": (_BatchNorm,), "mvit": ()}


def trained_like(family, **options):
    """A backbone in evaluation whose every factor and statistic does something."""
    torch.manual_seed(0)
    backbone = FAMILIES[family](**options).eval()
    set_mask(backbone, 1.0)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, (_BatchNorm, nn.LayerNorm, LayerScale)):
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module, (_BatchNorm, nn.LayerNorm)):
                module.bias.normal_(0, 0.3)
    return backbone.requires_grad_(False)


def images(height=64, width=96):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def within(deployed, expected, tolerance=1e-5):
    for a, b in zip(deployed, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("ffn_conv", [0, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_is_that_of_the_decayed_model(family, ffn_conv):
    backbone = trained_like(family, ffn_conv=ffn_conv)
    expected = backbone(images())
    backbone.switch_to_deploy()
    within(backbone(images()), expected)
    once = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.switch_to_deploy()
    assert_close(backbone.state_dict(), once, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_that_could_be_folded(family):
    backbone = trained_like(family)
    kinds = (nn.Dropout, DropPath, *FOLDED[family])
    assert any(isinstance(m, kinds) for m in backbone.modules())
    backbone.switch_to_deploy()
    left = [n for n, m in backbone.named_modules() if isinstance(m, kinds)]
    # A norm of an output has no layer in front of it, but a sum.
    assert [name for name in left if not name.startswith("norm")] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_built_deployed_takes_the_folded_weights(family):
    backbone = trained_like(family, ffn_conv=3)
    backbone.switch_to_deploy()
    built = FAMILIES[family](ffn_conv=3, deploy=True).eval()
    built.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        assert_close(built(images()), backbone(images()), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.long
def test_compiled_once_it_serves_every_size(family):
    backbone = trained_like(family)
    backbone.switch_to_deploy()
    torch._dynamo.reset()
    # One family through the code generator, which takes half a minute; what could break
    # in the others is what is traced.
    backend = "inductor" if family == "vit" else "aot_eager"
    compiled = torch.compile(backbone, dynamic=True, backend=backend)
    for size in ((64, 96), (128, 80)):
        within(compiled(images(*size)), backbone(images(*size)), 1e-4)


@pytest.mark.parametrize("stride_q", [1, 2])
def test_pooling_q_k_and_v_together_is_mmpretrains_pooling(stride_q):
    torch.manual_seed(0)
    grid = (7, 10)
    attention = CastlingMultiScaleAttention(12, 24, 3, stride_q=stride_q).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.uniform_(-1, 1)
    x = torch.randn(2, 70, 12, dtype=torch.double)

    q, k, v = (
        attention_pool(split_heads(part, 3), pool, grid, norm=norm)[0]
        for part, pool, norm in zip(
            attention.qkv(x).chunk(3, dim=2),
            (attention.pool_q, attention.pool_k, attention.pool_v),
            (attention.norm_q, attention.norm_k, attention.norm_v),
            strict=True,
        )
    )
    y, out_grid = attention.mixer(q, k, v, grid) + q, grid
    if stride_q == 2:
        pool, norm = attention.pool_out, attention.norm_out
        y, out_grid = attention_pool(y, pool, grid, norm=norm)

    out, found = attention(x, grid)
    assert tuple(found) == tuple(out_grid)
    assert_close(out, attention.proj(merge_heads(y)))


@pytest.mark.parametrize("ffn_conv", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_computed_with_what_stands_before_them(family, ffn_conv):
    backbone = trained_like(family, ffn_conv=ffn_conv)
    for module in backbone.modules():
        if hasattr(module, "dwconv"):
            nn.init.normal_(module.dwconv.weight, std=0.3)  # no longer the identity
    expected = backbone(images())
    backbone.switch_to_deploy()
    mlps = [
        m for m in backbone.modules() if isinstance(m, (FFN, ConvMViTMLP, ConvLeViTMLP))
    ]
    called = []
    kind = nn.Conv2d if ffn_conv else nn.Linear
    with pytest.MonkeyPatch.context() as patch:
        compute = fast._OPERATORS[kind]

        def noting(layer, name, x):
            called.append(name[0])
            return compute(layer, name, x)

        patch.setitem(fast._OPERATORS, kind, noting)
        found = backbone(images())
    activation = "hardswish" if family == "levit" else "gelu"
    assert called.count(activation) == len(mlps) > 0
    within(found, expected)


GATED = dict(layer_cfgs=dict(ffn_type="swiglu_fused"))
BUILT = [(name, {}) for name in FAMILIES]
BUILT += [(name, dict(attention=dict(type="softmax"))) for name in FAMILIES]
BUILT += [("vit", dict(ffn_conv=3)), ("levit", dict(ffn_conv=3)), ("vit", GATED)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
@pytest.mark.parametrize(("family", "options"), BUILT, ids=str)
def test_every_linear_layer_of_a_deployed_backbone_takes_one_pass(family, options):
    backbone = FAMILIES[family](deploy=True, **options).eval().requires_grad_(False)
    with profile() as calls:
        backbone(images())
    fused = [e for e in calls.function_events if "_linear_pointwise" in e.name]
    layers = [m for m in backbone.modules() if type(m) is nn.Linear]
    assert len(fused) == len(layers) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_stay_those_of_the_layers(family):
    backbone = trained_like(family, ffn_conv=3)
    before = count_macs(backbone, images()).macs
    backbone.switch_to_deploy()
    assert count_macs(backbone, images()).macs == before
