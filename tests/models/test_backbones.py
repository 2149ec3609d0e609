"""What the three backbones have in common, one test for all of them.

What is special to a family stands in a file of its own beside this one.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch.testing import assert_close

import mmcastling.models
from mmcastling.attention import MIXERS
from mmcastling.errors import OptionError
from mmcastling.models import CastlingLeViT, CastlingMViT, CastlingViT
from mmcastling.registry import MODELS
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

SOFTMAX = dict(type="softmax")
# Stage blocks: 2, 3, 4 heads of 8. Between stages: 4 and 6 heads of 16.
LEVIT = dict(
    embed_dims=[16, 24, 32], key_dims=[4, 4, 4], num_heads=[2, 2, 4], depths=[1, 1, 1]
)


@dataclass
class Family:
    """How a backbone is built small, and what is then true of it."""

    kind: type
    arch: dict[str, Any]
    strides: tuple[int, ...]  # of all outputs, with the options in `all_outputs`
    channels: tuple[int, ...]
    all_outputs: dict[str, Any]
    attentions: int
    smallest: int  # side of the smallest image
    too_small: str
    unit: str  # what out_indices number
    units: int
    known: str  # an architecture that the message names
    rates: list[float]  # stochastic depth at 0.6
    frozen: dict[int, tuple[tuple[str, ...], tuple[str, ...]]]  # and what still learns
    head: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    bad: tuple[tuple[dict[str, Any], str], ...] = ()


FAMILIES = {
    "vit": Family(
        CastlingViT,
        dict(embed_dims=24, num_layers=3, num_heads=3, feedforward_channels=48),
        strides=(8, 8, 8),
        channels=(24, 24, 24),
        all_outputs=dict(out_indices=(0, 1, 2)),
        attentions=3,
        smallest=8,
        too_small="7x64 pixels is smaller than a patch",
        unit="layer",
        units=3,
        known="nano",
        rates=[0.0, 0.3, 0.6],
        # mmpretrain's 0 freezes nothing.
        frozen={
            2: (("layers.0.", "layers.1.", "patch_embed", "pos_embed"), ("layers.2.",))
        },
        head=dict(type="LinearClsHead", num_classes=5, in_channels=24),
        options=dict(
            img_size=32, patch_size=8, out_type="featmap", with_cls_token=False
        ),
        bad=(
            (dict(arch=dict(embed_dims=8)), "lacks .*'num_layers'"),
            (dict(stem="pool"), "'pool' is not known"),
            (dict(stem="conv", patch_size=12), "power of two, got 12"),
            (dict(windows=7), "'windows'"),
        ),
    ),
    "levit": Family(
        CastlingLeViT,
        LEVIT,
        strides=(8, 16, 32, 64),
        channels=(8, 16, 24, 32),
        all_outputs=dict(out_indices=(0, 1, 2), out_stem=True),
        attentions=3 + 2,
        smallest=16,
        too_small="15x64 pixels is smaller than the stem",
        unit="stage",
        units=3,
        known="128s",
        rates=[0.6 * i / 7 for i in range(8)],
        frozen={
            0: (("patch_embed.",), ("stages.0.", "stages.1.")),
            1: (("patch_embed.", "stages.0."), ("stages.1.",)),
        },
        head=dict(
            type="LeViTClsHead", num_classes=5, in_channels=32, distillation=False
        ),
        options=dict(img_size=64),
        bad=(
            (dict(arch=dict(embed_dims=[8])), "lacks .*'depths'"),
            (dict(arch=dict(LEVIT, depths=[1, 1])), "one number per stage"),
            (dict(arch=dict(LEVIT, depths=1)), "one number per stage"),
            (dict(arch=dict(LEVIT, embed_dims=[12, 24, 32])), "12 is not a multiple"),
            (dict(arch=dict(LEVIT, key_dims=[4, 4, 5])), "be split|not a multiple"),
            (dict(frozen_stages=4), "frozen_stages 4 must be"),
            (dict(img_size=(64, 64, 3)), r"img_size \(64, 64, 3\) must be"),
        ),
    ),
    "mvit": Family(
        CastlingMViT,
        # Blocks of 8, 16, 32, 32 channels in 1, 2, 4, 4 heads; 1 and 2 downsample.
        dict(embed_dims=8, num_layers=4, num_heads=1, downscale_indices=[1, 2]),
        strides=(4, 8, 16),
        channels=(8, 16, 32),
        all_outputs=dict(out_indices=(0, 1, 2)),
        attentions=4,
        smallest=4,
        too_small="3x64 pixels is smaller than a patch",
        unit="scale",
        units=3,
        known="tiny",
        rates=[0.0, 0.2, 0.4, 0.6],
        frozen={
            0: (("patch_embed.", "pos_embed"), ("blocks.0.", "blocks.1.")),
            # The block that leaves a scale belongs to it.
            2: (
                ("blocks.0.", "blocks.1.", "patch_embed.", "pos_embed"),
                ("blocks.2.", "blocks.3."),
            ),
        },
        head=dict(type="LinearClsHead", num_classes=5, in_channels=32),
        options=dict(img_size=32, use_abs_pos_embed=True),
        bad=(
            (dict(arch=dict(embed_dims=8)), "lacks .*'num_layers'"),
            (
                dict(attention=[None, None]),
                "list of 2: give one entry for each of the 3",
            ),
            (dict(out_scales=1), "'out_scales'.* with out_indices in place"),
            (dict(frozen_stages=4), "frozen_stages 4 must be"),
            (dict(img_size=(32,)), r"img_size \(32,\) must be"),
        ),
    ),
}

everywhere = pytest.mark.parametrize("name", FAMILIES)
SCOPES = ("mmcastling.", "mmpretrain.")
attentions = pytest.mark.parametrize(
    "attention", [dict(mask_threshold="1/N"), SOFTMAX], ids=["castling", "softmax"]
)


def built(name, **options):
    torch.manual_seed(0)
    family = FAMILIES[name]
    return family.kind(**{"arch": family.arch, **family.options, **options})


def image(height=64, width=64, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator)


def loss(outs):
    """Not a plain square: the norms at the outputs would leave it constant."""
    return sum((out**3).sum() for out in outs)


# -- outputs ---------------------------------------------------------------------------


@everywhere
def test_what_lies_behind_the_last_output_is_neither_run_nor_trained(name):
    whole, part = built(name, out_indices=(0, 1, 2)), built(name, out_indices=0)
    part.load_state_dict(whole.state_dict(), strict=False)
    (found,) = part(image())
    assert_close(found, whole(image())[0], rtol=0, atol=0)
    loss([found]).backward()
    for key, parameter in part.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), key
    assert any(not p.requires_grad for p in part.parameters())
    assert all(p.requires_grad for p in whole.parameters())
    with pytest.raises(ValueError, match=r"out_indices \(\) name no"):
        built(name, out_indices=())


@everywhere
@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    ffn_conv=st.sampled_from([0, 3]),
    attention=st.sampled_from(
        [dict(), SOFTMAX, dict(local_conv="grid"), dict(type="linear_angular")]
    ),
)
def test_any_image_size(name, height, width, ffn_conv, attention):
    family = FAMILIES[name]
    options = dict(family.all_outputs, ffn_conv=ffn_conv, attention=attention)
    outs = built(name, **options).eval()(image(height, width, 1))
    sizes = [
        (1, channels, -(-height // stride), -(-width // stride))
        for channels, stride in zip(family.channels, family.strides, strict=True)
    ]
    assert [tuple(out.shape) for out in outs] == sizes


@everywhere
def test_the_smallest_image_is_taken_and_a_smaller_one_refused(name):
    family = FAMILIES[name]
    backbone = built(name).eval()
    (out,) = backbone(image(family.smallest, 64, 1))
    assert out.shape[2] == 1 and out.isfinite().all()
    with pytest.raises(ValueError, match=family.too_small):
        backbone(image(family.smallest - 1, 64))


@everywhere
def test_outputs_may_be_counted_from_the_end(name):
    plain, negative = (built(name, out_indices=i).eval() for i in ((0, 2), (0, -1)))
    negative.load_state_dict(plain.state_dict())
    for one, other in zip(plain(image()), negative(image()), strict=True):
        assert_close(one, other, atol=0, rtol=0)
    first, last = negative(image())
    assert first.shape != last.shape or not torch.equal(first, last)


@everywhere
def test_inner_outputs_do_not_change_the_last_one(name):
    family = FAMILIES[name]
    alone, several = built(name).eval(), built(name, **family.all_outputs).eval()
    result = several.load_state_dict(alone.state_dict(), strict=False)
    # An inner output has a norm of its own, if it has one at all.
    assert all("norm" in key or "ln" in key for key in result.missing_keys)
    for key, parameter in several.named_parameters():
        if key in result.missing_keys:
            torch.nn.init.constant_(parameter, 3.0)
    assert_close(several(image())[-1], alone(image())[0])


@everywhere
def test_a_state_dict_goes_round(name):
    one, other = built(name, ffn_conv=3), built(name, ffn_conv=3)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.equal(one.eval()(image())[0], other.eval()(image())[0])
    other.load_state_dict(one.state_dict())
    assert_close(one(image())[0], other(image())[0], atol=0, rtol=0)


# -- attention -------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("kind", sorted(MIXERS))
def test_every_mixer_fits_and_is_the_one_in_every_block(name, kind):
    backbone = built(name, attention=dict(type=kind))
    mixers = [m for m in backbone.modules() if type(m) is MIXERS[kind]]
    # Softmax is the library's own attention in the pyramids.
    assert len(mixers) == FAMILIES[name].attentions or kind == "softmax"
    (out,) = backbone(image(64, 96))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


@everywhere
def test_softmax_with_a_convolution_keeps_the_castled_projections(name):
    castled = built(name)
    control = built(name, attention=dict(type="softmax", local_conv="token"))
    assert control.state_dict().keys() == castled.state_dict().keys()
    assert len(list(castling_modules(castled))) == FAMILIES[name].attentions
    assert list(castling_modules(control)) == []


@everywhere
def test_linear_angular_is_the_same_network_without_branch(name):
    castled = built(name, deploy=True).eval()
    linear = built(name, attention=dict(type="linear_angular"), deploy=True).eval()
    linear.load_state_dict(castled.state_dict())
    assert_close(linear(image())[0], castled(image())[0], atol=0, rtol=0)


@everywhere
@pytest.mark.parametrize("ffn_conv", [0, 5])
def test_deployed_equals_decayed_and_differs_from_undecayed(name, ffn_conv):
    spec = dict(mask_threshold=0.0)
    backbone = built(name, ffn_conv=ffn_conv, attention=spec).eval()
    with_branch = backbone(image())[0]
    set_mask(backbone, 1.0)
    decayed = backbone(image())[0]
    backbone.switch_to_deploy()
    backbone.switch_to_deploy()
    assert backbone.deploy and not list(castling_modules(backbone))
    deployed = backbone(image())[0]
    fresh = built(name, ffn_conv=ffn_conv, deploy=True).eval()
    fresh.load_state_dict(backbone.state_dict())
    assert (deployed - decayed).abs().max() <= 1e-5 * decayed.abs().max()
    assert_close(fresh(image())[0], deployed, atol=0, rtol=0)
    assert (with_branch - decayed).abs().max() > 1e-3


# -- training --------------------------------------------------------------------------


@everywhere
@attentions
def test_every_parameter_learns(name, attention):
    family = FAMILIES[name]
    options = dict(family.all_outputs, ffn_conv=3, attention=attention)
    if name == "vit":
        options.update(stem="conv", with_cls_token=True)
    if name == "levit":
        options.update(final_norm=True)
    backbone = built(name, **options)
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2, weight_decay=0)
    loss(backbone(image(128, 128) if name == "levit" else image())).backward()
    optimizer.step()
    after = dict(backbone.named_parameters())
    assert [n for n in before if torch.equal(before[n], after[n])] == []


@everywhere
@attentions
def test_autocast_stays_close_and_finite(name, attention):
    backbone = built(name, attention=attention, ffn_conv=3).eval()
    exact = backbone(image())[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = backbone(image())[0]
    assert_close(out.float(), exact, atol=0.2, rtol=0.1)


@everywhere
def test_drop_path_rises_with_depth(name):
    backbone = built(name, drop_path_rate=0.6)
    rates = [
        getattr(module.drop_path, "drop_prob", 0.0)
        for module in backbone.modules()
        if hasattr(module, "drop_path")
    ]
    assert rates == pytest.approx(FAMILIES[name].rates)


@pytest.mark.parametrize(
    ("name", "stages"), [(n, s) for n in FAMILIES for s in FAMILIES[n].frozen]
)
def test_frozen_stages_have_no_gradient_and_stay_in_evaluation(name, stages):
    frozen, learning = FAMILIES[name].frozen[stages]
    backbone = built(name, frozen_stages=stages, drop_path_rate=0.5)
    assert backbone.train() is backbone and backbone.training
    for part, parameter in backbone.named_parameters():
        if part.startswith(frozen):
            assert not parameter.requires_grad, part
        if part.startswith(learning):
            assert parameter.requires_grad, part
    modes = {n: m.training for n, m in backbone.named_modules() if n}
    inside = {n: on for n, on in modes.items() if f"{n}.".startswith(frozen)}
    assert inside and not any(inside.values())
    assert all(on for n, on in modes.items() if f"{n}.".startswith(learning))
    loss(backbone(image())).backward()
    grads = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert not any(n.startswith(frozen) for n in grads)
    for prefix in learning:
        assert any(n.startswith(prefix) for n in grads)
    assert backbone.eval() is backbone and not backbone.training
    nothing = built(name, frozen_stages=-1)
    assert all(p.requires_grad for p in nothing.parameters())


# -- construction ----------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(
    ("scope", "prefix"),
    [
        ("mmpretrain", ""),
        *((s, p) for s in ("mmpretrain", "mmdet", "mmseg") for p in SCOPES),
    ],
)
def test_built_by_name_from_every_toolbox(name, scope, prefix):
    family = FAMILIES[name]
    toolbox = __import__(f"{scope}.registry", fromlist=["MODELS"])
    config = dict(type=prefix + family.kind.__name__, arch=family.arch)
    with DefaultScope.overwrite_default_scope(scope):
        backbone = toolbox.MODELS.build(config)
    assert type(backbone) is family.kind
    for registry in (MODELS, MMPRETRAIN_MODELS):
        assert registry.get(family.kind.__name__) is family.kind


@everywhere
def test_an_image_classifier_of_mmpretrain_takes_it(name):
    family = FAMILIES[name]
    backbone = dict(family.options, type=family.kind.__name__, arch=family.arch)
    neck = dict(type="GlobalAveragePooling")
    model = dict(type="ImageClassifier", backbone=backbone, neck=neck, head=family.head)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        classifier = MMPRETRAIN_MODELS.build(model)
    assert classifier(image(), mode="tensor").shape == (2, 5)


SHARED = [
    (dict(attention=dict(type="mean")), "'mean' is not known"),
    (dict(attention=dict(heads=3)), "'heads'"),
    (dict(ffn_conv=4), "ffn_conv 4 must be 0"),
    (dict(out_indices=3), "3 is not a {0.unit}; there are {0.units}"),
    (dict(out_indices=(0, -4)), "-4 is not a {0.unit}"),
    (dict(arch="huge"), "'huge' is not known: choose one of .*'{0.known}'"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (name, options, message.format(family) if index < len(SHARED) else message)
        for name, family in FAMILIES.items()
        for index, (options, message) in enumerate([*SHARED, *family.bad])
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        built(name, **options)


@pytest.mark.parametrize("name", ["CastlingViT", "CastlingLeViT", "CastlingMViT"])
def test_attention_options_act_or_are_refused(name):
    build = getattr(mmcastling.models, name)
    with pytest.raises(OptionError, match="key_dims=7 follows from the network"):
        build(attention=dict(type="linear_angular", key_dims=7))
    build(attention=dict(deploy=True))  # the backbone's own option decides


def test_an_attention_option_of_another_type_is_named():
    with pytest.raises(OptionError, match=r"num_heads.*'a'"):
        mmcastling.models.CastlingViT("nano", attention=dict(num_heads="a"))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_images_give_no_outputs_trained_and_deployed(family):
    model = family.kind(family.arch, **{**family.options, **family.all_outputs})
    images = torch.zeros(0, 3, 64, 64)
    for outs in (model(images), switch_to_deploy(model).eval()(images)):
        shapes = [
            (0, c, 64 // s, 64 // s)
            for c, s in zip(family.channels, family.strides, strict=True)
        ]
        assert [tuple(out.shape) for out in outs] == shapes
    sum(out.sum() for out in model(images)).backward()
