"""Layer-wise learning-rate decay in backbones, classifiers, detectors, segmentors."""

import copy
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmcastling  # noqa: F401  (makes mmdet importable without compiled mmcv ops)
from mmcastling.train import find_layered_backbones, layer_scale

NUM_BLOCKS = 3
RATE = 0.5
LR = 8e-3
WEIGHT_DECAY = 0.1
VIT = dict(
    type="mmpretrain.VisionTransformer",
    arch=dict(
        embed_dims=16, num_layers=NUM_BLOCKS, num_heads=2, feedforward_channels=32
    ),
    img_size=32,
    patch_size=16,
)
CONSTRUCTOR = "mmcastling.LayerDecayOptimWrapperConstructor"


def build(scope: str, cfg: dict) -> nn.Module:
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(copy.deepcopy(cfg))


def bare_backbone() -> nn.Module:
    return build("mmpretrain", VIT)


def classifier() -> nn.Module:
    head = dict(type="VisionTransformerClsHead", num_classes=5, in_channels=16)
    return build("mmpretrain", dict(type="ImageClassifier", backbone=VIT, head=head))


def detector() -> nn.Module:
    import mmdet.models  # noqa: F401

    return build(
        "mmdet",
        dict(
            type="RetinaNet",
            backbone=dict(VIT, out_type="featmap"),
            neck=dict(
                type="mmcastling.SimpleFeaturePyramid", in_channels=16, out_channels=8
            ),
            bbox_head=dict(
                type="RetinaHead",
                num_classes=3,
                in_channels=8,
                feat_channels=8,
                stacked_convs=1,
                anchor_generator=dict(
                    type="AnchorGenerator",
                    scales=[8],
                    ratios=[1.0],
                    strides=[4, 8, 16, 32, 64],
                ),
            ),
            train_cfg=dict(
                assigner=dict(
                    type="MaxIoUAssigner",
                    pos_iou_thr=0.5,
                    neg_iou_thr=0.4,
                    min_pos_iou=0,
                )
            ),
        ),
    )


def segmentor() -> nn.Module:
    import mmseg.models  # noqa: F401

    return build(
        "mmseg",
        dict(
            type="EncoderDecoder",
            backbone=dict(VIT, out_type="featmap"),
            decode_head=dict(
                type="FCNHead",
                in_channels=16,
                channels=8,
                num_classes=3,
                num_convs=1,
                in_index=0,
            ),
        ),
    )


MODELS_UNDER_TEST = {
    "bare_backbone": (bare_backbone, ""),
    "classifier": (classifier, "backbone."),
    "detector": (detector, "backbone."),
    "segmentor": (segmentor, "backbone."),
}
every_model = pytest.mark.parametrize(
    ("make", "prefix"), MODELS_UNDER_TEST.values(), ids=MODELS_UNDER_TEST.keys()
)


def optimize(model: nn.Module, optimizer: dict | None = None, **paramwise):
    cfg = dict(
        optimizer=optimizer or dict(type="AdamW", lr=LR, weight_decay=WEIGHT_DECAY),
        constructor=CONSTRUCTOR,
        paramwise_cfg=dict(dict(layer_decay_rate=RATE), **paramwise),
    )
    return build_optim_wrapper(model, cfg).optimizer


def settings_by_name(model: nn.Module, optimizer) -> dict[str, dict]:
    """Group of each parameter by its name in the model, found by identity."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, dict] = {}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        for param in group["params"]:
            name = names[id(param)]
            assert name not in found, f"{name} is in two groups"
            found[name] = group
    return found


# ------------------------------------------------------------------------- the rule


@given(st.integers(1, 40), st.floats(0.01, 1.0))
def test_scale_is_one_at_the_top_and_falls_by_rate_at_each_layer(num_layers, rate):
    scales = [layer_scale("w", i, num_layers, rate) for i in range(num_layers)]

    assert scales[-1] == 1
    for lower, upper in pairwise(scales):
        assert lower == pytest.approx(upper * rate)


@pytest.mark.parametrize("rate", [0, -0.5, 1.0001, float("nan")])
def test_rate_outside_its_range_is_named(rate):
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {rate}"):
        layer_scale("w", 0, 3, rate)
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {rate}"):
        optimize(bare_backbone(), layer_decay_rate=rate)


@pytest.mark.parametrize("depth", [-1, 3])
def test_impossible_depth_is_named_with_its_parameter(depth):
    with pytest.raises(
        ValueError, match=rf"'blocks.w' must be in \[0, 3\), got {depth}"
    ):
        layer_scale("blocks.w", depth, 3, 0.5)


# ------------------------------------------------------------------------- the models


@every_model
def test_every_layer_has_its_scale(make, prefix):
    model = make()
    found = settings_by_name(model, optimize(model))

    stem = RATE ** (NUM_BLOCKS + 1)
    expected = {
        "cls_token": stem,
        "pos_embed": stem,
        "patch_embed.projection.weight": stem,
        "layers.0.attn.qkv.weight": RATE**3,
        "layers.1.ffn.layers.1.bias": RATE**2,
        "layers.2.ln1.weight": RATE,
    }
    for name, scale in expected.items():
        group = found[f"{prefix}{name}"]
        assert group["lr"] == pytest.approx(LR * scale), name
        assert group["lr_scale"] == pytest.approx(scale), name
    outside = [name for name in found if prefix and not name.startswith(prefix)]
    assert bool(outside) == bool(prefix)
    assert all(found[name]["lr"] == LR for name in outside)


@every_model
def test_no_parameter_is_lost_or_in_two_groups(make, prefix):
    model = make()
    found = settings_by_name(model, optimize(model, norm_decay_mult=0.0))

    assert found.keys() == dict(model.named_parameters()).keys()


def test_groups_are_few():
    """Blocks, stem and top, each with and without weight decay."""
    optimizer = optimize(detector(), norm_decay_mult=0.0, flat_decay_mult=0.0)

    settings = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert len(settings) == len(set(settings)) == 2 * (NUM_BLOCKS + 2)


def test_agrees_with_mmpretrains_constructor_where_that_one_works():
    model = classifier()
    paramwise = dict(
        layer_decay_rate=RATE,
        norm_decay_mult=0.0,
        bias_decay_mult=0.25,
        flat_decay_mult=0.5,
        custom_keys={
            ".cls_token": dict(decay_mult=0.0),
            ".pos_embed": dict(decay_mult=0.0),
        },
    )
    cfg = dict(
        optimizer=dict(type="AdamW", lr=LR, weight_decay=WEIGHT_DECAY),
        constructor="mmpretrain.LearningRateDecayOptimWrapperConstructor",
        paramwise_cfg=paramwise,
    )
    theirs = build_optim_wrapper(model, cfg).optimizer
    expected = {
        group["param_name"]: (group["lr"], group["weight_decay"])
        for group in theirs.param_groups
    }

    ours = settings_by_name(model, optimize(model, **paramwise))

    assert {n: (g["lr"], g["weight_decay"]) for n, g in ours.items()} == expected


def test_wrapped_model_gives_the_same_groups():
    class Wrapper(nn.Module):
        """Stands for DistributedDataParallel, which needs a process group."""

        def __init__(self, module):
            super().__init__()
            self.module = module

    model = detector()
    plain, wrapped = optimize(model), optimize(Wrapper(model))

    assert len(plain.param_groups) == len(wrapped.param_groups)
    for a, b in zip(plain.param_groups, wrapped.param_groups, strict=True):
        assert a == b


def test_backbones_of_nested_models_are_found():
    """Teacher and student, as in semi-supervised detectors."""

    class Pair(BaseModel):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = classifier(), classifier()

        def forward(self, inputs, data_samples=None, mode="tensor"):
            return inputs

    model = Pair()
    found = settings_by_name(model, optimize(model))

    for branch in ("student", "teacher"):
        name = f"{branch}.backbone.layers.0.attn.qkv.weight"
        assert found[name]["lr"] == pytest.approx(LR * RATE**3)
        assert found[f"{branch}.head.layers.head.weight"]["lr"] == LR


def test_the_outermost_backbone_answers_for_the_ones_inside_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = bare_backbone()

        def get_layer_depth(self, param_name, prefix=""):
            return 0, 2

    model = nn.Module()
    model.backbone = Outer()

    assert list(find_layered_backbones(model)) == ["backbone."]
    assert {group["lr_scale"] for group in optimize(model).param_groups} == {RATE}


def test_a_backbone_without_depths_is_named():
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 4, 1)
    with pytest.raises(ValueError, match=r"get_layer_depth.*its backbone: Conv2d"):
        optimize(model)
    with pytest.raises(ValueError, match="Linear has no backbone"):
        optimize(nn.Linear(2, 2))


# ---------------------------------------------------------------------- the settings


def test_tokens_and_position_embeddings_have_no_weight_decay():
    model = classifier()
    found = settings_by_name(model, optimize(model))

    free = {name for name, group in found.items() if group["weight_decay"] == 0}
    assert free == {"backbone.cls_token", "backbone.pos_embed"}
    assert all(
        group["weight_decay"] == WEIGHT_DECAY
        for name, group in found.items()
        if name not in free
    )


def test_they_have_none_where_the_config_leaves_it_to_the_optimizer():
    """AdamW's own default is 0.01."""
    model = classifier()
    found = settings_by_name(model, optimize(model, dict(type="AdamW", lr=LR)))

    assert found["backbone.pos_embed"]["weight_decay"] == 0
    assert found["backbone.layers.0.attn.qkv.weight"]["weight_decay"] == 0.01


def test_no_decay_names_can_be_replaced():
    model = classifier()
    found = settings_by_name(model, optimize(model, no_decay_names=["pos_embed"]))

    assert found["backbone.pos_embed"]["weight_decay"] == 0
    assert found["backbone.cls_token"]["weight_decay"] == WEIGHT_DECAY


def test_custom_keys_win_and_multiply_with_the_scale():
    model = classifier()
    optimizer = optimize(
        model,
        custom_keys={
            "pos_embed": dict(decay_mult=0.5),
            "backbone.layers.1": dict(lr_mult=0.1),
            "head": dict(lr_mult=10.0, decay_mult=0.0),
        },
    )
    found = settings_by_name(model, optimizer)

    assert found["backbone.pos_embed"]["weight_decay"] == WEIGHT_DECAY * 0.5
    block = found["backbone.layers.1.attn.qkv.weight"]
    assert block["lr"] == pytest.approx(LR * RATE**2 * 0.1)
    head = found["head.layers.head.weight"]
    assert (head["lr"], head["weight_decay"]) == (LR * 10, 0)


def test_a_custom_key_with_a_dot_matches_a_parameter_of_the_root():
    model = bare_backbone()
    optimizer = optimize(model, custom_keys={".cls_token": dict(decay_mult=1.0)})

    found = settings_by_name(model, optimizer)
    assert found["cls_token"]["weight_decay"] == WEIGHT_DECAY
    assert found["pos_embed"]["weight_decay"] == 0


def test_frozen_parameters_are_left_out():
    model = classifier()
    model.backbone.patch_embed.requires_grad_(False)
    found = settings_by_name(model, optimize(model))

    left_out = dict(model.named_parameters()).keys() - found.keys()
    assert left_out == {
        "backbone.patch_embed.projection.weight",
        "backbone.patch_embed.projection.bias",
    }


def test_shared_parameters_are_an_error_unless_asked_for():
    model = classifier()
    model.backbone.layers[2].attn.qkv = model.backbone.layers[0].attn.qkv
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.qkv\.weight.*bypass_dupl"):
        optimize(model)

    found = settings_by_name(model, optimize(model, bypass_duplicate=True))
    shared = found["backbone.layers.0.attn.qkv.weight"]
    assert shared["lr"] == pytest.approx(LR * RATE**3)


def test_rate_one_decays_nothing():
    optimizer = optimize(classifier(), layer_decay_rate=1)

    assert {group["lr"] for group in optimizer.param_groups} == {LR}


@pytest.mark.parametrize(
    ("optimizer", "paramwise", "message"),
    [
        (dict(type="AdamW", lr=LR), dict(layer_decay_rate=None), "layer_decay_rate"),
        (dict(type="AdamW"), {}, "optimizer must give lr"),
    ],
)
def test_missing_settings_are_named(optimizer, paramwise, message):
    with pytest.raises(ValueError, match=message):
        optimize(classifier(), optimizer, **paramwise)


# ----------------------------------------------------------------- logging and training


def test_one_table_is_logged_and_no_line_per_parameter():
    class Capture(logging.Handler):
        def __init__(self):
            super().__init__(logging.INFO)
            self.lines = []

        def emit(self, record):
            self.lines += record.getMessage().splitlines()

    model = classifier()
    model.backbone.patch_embed.requires_grad_(False)
    logger, capture = MMLogger.get_current_instance(), Capture()
    filters = list(logger.filters)
    logger.addHandler(capture)
    try:
        optimizer = optimize(model, norm_decay_mult=0.0)
    finally:
        logger.removeHandler(capture)

    rows = [line.split() for line in capture.lines[2:-1]]
    assert capture.lines[0].startswith("parameter groups")
    assert capture.lines[-1] == "left out: 2 tensors with requires_grad=False"
    assert len(rows) == len(optimizer.param_groups)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(int(row[4].replace(",", "")) for row in rows) == trained
    assert logger.filters == filters


def test_lower_layers_move_less_in_a_step():
    """SGD on equal gradients moves each parameter by its learning rate."""
    model = classifier()
    optimizer = optimize(model, dict(type="SGD", lr=LR))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()

    for name, scale in {
        "backbone.layers.0.attn.qkv.weight": RATE**3,
        "backbone.layers.2.attn.qkv.weight": RATE,
        "head.layers.head.weight": 1.0,
    }.items():
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, torch.full_like(moved, LR * scale))


def test_state_survives_saving_and_loading(tmp_path):
    model = classifier()
    optimizer = optimize(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    other = optimize(model, dict(type="AdamW", lr=1.0))

    other.load_state_dict(torch.load(tmp_path / "optimizer.pth", weights_only=True))

    assert [g["lr"] for g in other.param_groups] == [
        g["lr"] for g in optimizer.param_groups
    ]
