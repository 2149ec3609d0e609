"""``type='mmcastling.Castled'``: backbones of the toolboxes, castled by a config."""

import copy
import importlib.util
import pickle
import sys

import pytest
import torch
from known_models import BIASES, images
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import load_checkpoint
from torch.testing import assert_close

from mmcastling import castling_modules, set_mask, switch_to_deploy
from mmcastling.deploy import tensors_in as each_tensor_in
from mmcastling.errors import UserError
from mmcastling.registry import MODELS
from mmcastling.run.conversion import deploy_config
from mmcastling.train.layer_decay import (
    LayerDecayOptimWrapperConstructor,
    find_layered_backbones,
)

SMALL = dict(embed_dims=24, num_layers=3, num_heads=3)
SWIN = dict(
    type="mmdet.SwinTransformer",
    embed_dims=12,
    depths=[2, 2],
    num_heads=[1, 2],
    window_size=4,
    strides=(4, 2),
    out_indices=(0, 1),
)
VIT = dict(
    type="mmpretrain.VisionTransformer",
    arch=dict(SMALL, feedforward_channels=48),
    img_size=64,
    out_type="featmap",
)
TIMM = dict(
    type="mmpretrain.TIMMBackbone",
    model_name="deit3_small_patch16_224",
    features_only=True,
    out_indices=[2],
    img_size=64,
    dynamic_img_size=True,
    embed_dim=24,
    depth=3,
    num_heads=3,
)
BACKBONES = {
    "mmdet-swin": SWIN,
    "mmpretrain-swin": dict(
        type="mmpretrain.SwinTransformer",
        arch=dict(embed_dims=12, depths=[2, 2], num_heads=[1, 2]),
        img_size=64,
        window_size=4,
        out_indices=(0, 1),
        pad_small_map=True,
    ),
    "mmseg-swin": dict(SWIN, type="mmseg.SwinTransformer"),
    "mmpretrain-vit": VIT,
    "mmpretrain-beit": dict(
        type="mmpretrain.BEiTViT", arch=VIT["arch"], img_size=64, use_rel_pos_bias=True
    ),
    "mmseg-vit": dict(
        type="mmseg.VisionTransformer", img_size=64, out_indices=-1, **SMALL
    ),
    "timm": TIMM,
}


@pytest.fixture(autouse=True, scope="module")
def in_mmdet():
    init_default_scope("mmdet")


def tensors_in(output):
    return list(each_tensor_in(output))


def evaluating(model):
    model.eval()  # which returns nothing in some of the toolboxes
    return model


def build(backbone, **options):
    torch.manual_seed(0)
    config = dict(type="mmcastling.Castled", backbone=backbone, **options)
    return evaluating(MODELS.build(ConfigDict(config)))


@pytest.fixture(params=BACKBONES)
def original(request):
    """A backbone with weights that matter, no biases of pairs, and its config."""
    if request.param == "timm":
        pytest.importorskip("timm")
    torch.manual_seed(1)
    backbone = evaluating(MODELS.build(dict(BACKBONES[request.param])))
    with torch.no_grad():
        for name, weight in backbone.named_parameters():
            if any(bias in name for bias in BIASES):
                weight.zero_()
            elif weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.1)
    return BACKBONES[request.param], backbone


def test_the_backbone_stays_itself_and_takes_its_own_weights(original):
    config, before = original
    castled = build(config, attention=dict(type="softmax"), keep=[-1])
    assert type(castled) is type(before)
    missing, unexpected = castled.load_state_dict(before.state_dict(), strict=False)
    assert not missing and not unexpected
    expected, found = before(images((64, 64))), castled(images((64, 64)))
    assert_close(tensors_in(found), tensors_in(expected), rtol=1e-4, atol=1e-4)
    for copied in (copy.deepcopy(castled), pickle.loads(pickle.dumps(castled))):
        assert_close(tensors_in(copied(images((64, 64)))), tensors_in(found))


@pytest.mark.parametrize("attention", [None, dict(type="hydra")], ids=["castling", ""])
def test_pretrained_weights_of_the_original_and_of_castled_ones_load(
    original, attention, tmp_path
):
    """Through ``init_cfg``: strictly but for what is new, whatever was dropped."""
    config, before = original
    castled = build(config, attention=attention)
    new = {n for n, _ in castled.named_parameters()} - set(before.state_dict())
    with torch.no_grad():
        for parameter in castled.parameters():
            torch.nn.init.normal_(parameter)
    for number, source in enumerate((before, castled)):
        path = tmp_path / f"{number}.pth"
        weights = {f"backbone.{n}": w for n, w in source.state_dict().items()}
        torch.save({"state_dict": weights}, path)
        start = dict(type="Pretrained", checkpoint=str(path))
        if not config["type"].startswith(("mmdet", "mmseg")):
            start["prefix"] = "backbone."
        elif config["type"] == "mmseg.VisionTransformer":
            torch.save({"state_dict": source.state_dict()}, path)
        model = build(dict(config, init_cfg=start), attention=attention)
        model.init_weights()
        own, expected = dict(model.named_parameters()), source.state_dict()
        loaded = {n for n in own if n in expected}
        if source is castled:
            assert loaded == set(own)
        elif config["type"] != "mmseg.VisionTransformer":  # which has other names
            assert set(own) - loaded == new
        assert_close(
            {n: own[n].detach() for n in loaded}, {n: expected[n] for n in loaded}
        )


@pytest.mark.parametrize("options", [{}, dict(stages=[0, 1], keep=[0])], ids=str)
def test_a_deployed_config_builds_what_deploying_leaves(original, options):
    config, _ = original
    config = dict(config, init_cfg=dict(type="Pretrained", checkpoint="none.pth"))
    castled = build(config, **options)
    set_mask(castled, 1.0)
    model = dict(type="mmcastling.Castled", backbone=config, **options)
    cfg = ConfigDict(model=ConfigDict(model))
    deployed_cfg = deploy_config(cfg).model
    assert deployed_cfg.deploy and "init_cfg" not in deployed_cfg.backbone
    deployed = evaluating(MODELS.build(deployed_cfg))
    deployed.init_weights()
    assert list(castling_modules(castled)) and not list(castling_modules(deployed))
    deployed.load_state_dict(switch_to_deploy(castled).state_dict())
    y, expected = deployed(images((64, 64))), castled(images((64, 64)))
    assert_close(tensors_in(y), tensors_in(expected), rtol=1e-4, atol=1e-4)


def test_what_is_new_in_a_frozen_stage_is_frozen():
    castled = build(dict(VIT, frozen_stages=2))
    trained = [n for n, p in castled.named_parameters() if p.requires_grad]
    assert [n for n in trained if "local_conv" in n] == [
        "layers.2.attn.mixer.local_conv.weight"
    ]
    castled = build(dict(SWIN, frozen_stages=1))
    castled.train()  # freezes
    trained = [n for n, p in castled.named_parameters() if p.requires_grad]
    assert len([n for n in trained if "local_conv" in n]) == 2
    assert not castled.stages[0].training and castled.stages[1].training


def test_layers_are_counted_where_a_backbone_does_not_number_them():
    model = torch.nn.Module()
    model.backbone = build(SWIN, keep=[1])
    (blocks,) = find_layered_backbones(model).values()
    depths = {
        name: blocks.get_layer_depth(name, "backbone.")[0]
        for name, _ in model.named_parameters()
    }
    assert depths["backbone.patch_embed.projection.weight"] == 0
    for stage, block, depth in ((0, 0, 1), (0, 1, 2), (1, 0, 3), (1, 1, 4)):
        prefix = f"backbone.stages.{stage}.blocks.{block}."
        found = {d for name, d in depths.items() if name.startswith(prefix)}
        assert found == {depth}
    assert depths["backbone.stages.0.downsample.norm.weight"] == 2
    assert depths["backbone.norm1.weight"] == 5
    constructor = LayerDecayOptimWrapperConstructor(
        dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.0)),
        dict(layer_decay_rate=0.5),
    )
    scales = [g["lr_scale"] for g in constructor(model).optimizer.param_groups]
    assert set(scales) == {0.5**n for n in range(6)}


def test_a_checkpoint_of_the_whole_detector_loads(tmp_path):
    detector = dict(
        type="mmdet.RetinaNet",
        backbone=SWIN,
        neck=dict(type="mmdet.FPN", in_channels=[12, 24], out_channels=8, num_outs=2),
        bbox_head=dict(
            type="mmdet.RetinaHead",
            num_classes=2,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            anchor_generator=dict(
                type="mmdet.AnchorGenerator", ratios=[1.0], scales=[1], strides=[4, 8]
            ),
        ),
    )
    before = MODELS.build(ConfigDict(detector))
    torch.save({"state_dict": before.state_dict()}, tmp_path / "whole.pth")
    detector["backbone"] = dict(type="mmcastling.Castled", backbone=SWIN)
    castled = MODELS.build(ConfigDict(detector))
    load_checkpoint(castled, str(tmp_path / "whole.pth"))
    missing, unexpected = castled.load_state_dict(before.state_dict(), strict=False)
    assert all("mixer" in name for name in missing) and not unexpected
    expected = before.state_dict()
    for name, value in castled.state_dict().items():
        if "mixer" not in name:
            assert_close(value, expected[name])


@pytest.mark.parametrize("whole", [False, True], ids=["features", "whole"])
def test_a_classifier_of_timm(whole):
    pytest.importorskip("timm")
    if whole:
        sizes = {
            k: v for k, v in TIMM.items() if k not in ("features_only", "out_indices")
        }
        model = dict(sizes, type="mmpretrain.TimmClassifier", num_classes=5)
        model = dict(type="mmcastling.Castled", backbone=model)
    else:
        model = dict(
            type="mmpretrain.ImageClassifier",
            backbone=dict(type="mmcastling.Castled", backbone=TIMM),
            neck=dict(type="mmpretrain.GlobalAveragePooling"),
            head=dict(type="mmpretrain.LinearClsHead", num_classes=5, in_channels=24),
        )
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = evaluating(MODELS.build(ConfigDict(model)))
    assert set_mask(model, 1.0) == 3
    scores = model(images((64, 64)), mode="tensor")
    scores = scores[0] if isinstance(scores, tuple) else scores
    expected = switch_to_deploy(model)(images((64, 64)), mode="tensor")
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert_close(scores, expected)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (dict(type="SwinTransformr"), {}, "'SwinTransformr' is not known in the scope"),
        (dict(type="mmdet.Swin"), {}, "'mmdet.Swin' is not known"),
        (dict(type="nowhere.Swin"), {}, "'nowhere.Swin' is not known"),
        (dict(arch="small"), {}, "expected the config of a backbone"),
        ("mmdet.SwinTransformer", {}, "expected the config of a backbone"),
        (
            dict(type="mmdet.ResNet", depth=18),
            {},
            "no attention in ResNet.*resemble one: none",
        ),
        (
            dict(type="mmseg.MixVisionTransformer", embed_dims=8),
            {},
            r"in MixVisionTransformer.*EfficientMultiheadAttention",
        ),
        (dict(type="mmcastling.CastlingViT", arch="nano"), {}, "castled already"),
        (dict(type="mmcastling.Castled", backbone=SWIN), {}, "castled already"),
        (SWIN, dict(keep=[4]), r"keep=\[4\]: 4 is none of the 4 attentions"),
        (SWIN, dict(keep=["stages.2"]), "'stages.2' is none of the 4"),
        (SWIN, dict(keep=[0, 1, 2, 3]), "select none of the attentions"),
        (SWIN, dict(stages=[2]), "2 is not a stage; there are 2"),
        (SWIN, dict(attention=dict(window=7)), "unexpected keyword argument 'window'"),
        (SWIN, dict(attention=dict(type="mean")), "'mean' is not known"),
        (SWIN, dict(attention="castling"), "expected options of the attention"),
        (SWIN, dict(attention=dict(keep=[0])), "keep, grid and deploy stand beside it"),
    ],
    ids=lambda value: value.get("type") if isinstance(value, dict) else "",
)
def test_what_cannot_be_castled_is_refused(backbone, options, message):
    with pytest.raises(UserError, match=message):
        build(backbone, **options)


def test_a_package_that_is_missing_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: name != "mmseg" and found(name),
    )
    with pytest.raises(UserError, match="needs mmseg: pip install onedl-mmseg"):
        build(BACKBONES["mmseg-swin"])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"TIMMBackbone cannot be built.*timm"):
        build(TIMM)
