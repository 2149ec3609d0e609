"""The configs and what ships with them: all build, twins differ in what they say."""

import contextlib
import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from mmengine.registry import HOOKS, MODELS, init_default_scope

from mmcastling.compat.model_index import models
from mmcastling.run import load_config
from mmcastling.run.conversion import deploy_config
from mmcastling.verbs import castling_modules, switch_to_deploy

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
MAIN = "mask_rcnn_castling_s_coco.py"


@functools.cache
def _read(path):
    return load_config(path)


def load(name):
    cfg = copy.deepcopy(_read(ROOT / "configs" / name))
    if "pretrained" in (inner := cfg.model.backbone.get("backbone", {})):
        inner.pretrained = False  # which timm downloads
    init_default_scope(cfg.default_scope)
    return cfg


def flat(node, prefix=""):
    """A config as one level of dotted keys."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, node


def differences(name, reference=MAIN):
    """Dotted keys in which a config differs from another, ``work_dir`` apart."""
    one, two = (dict(flat(load(n)._cfg_dict.to_dict())) for n in (name, reference))
    missing = object()
    keys = {k for k in {*one, *two} if one.get(k, missing) != two.get(k, missing)}
    return keys - {"work_dir"}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.long
def test_every_config_builds_and_deploys(path):
    cfg = load(path)
    # Without memory for the weights; Swin reads numbers from tensors as it is built.
    device = contextlib.nullcontext() if "swin" in path.stem else torch.device("meta")
    with device:
        parameters = build_and_deploy(cfg, path.stem)
    # That its MACs are the index's is counted for one of each kind in test_toolbox.py.
    assert parameters == models()[path.stem]["Metadata"]["Parameters"]


def build_and_deploy(cfg, name):
    """How many parameters the index gives: deployed, if it is castled."""
    model = MODELS.build(copy.deepcopy(cfg.model))
    attentions = len(list(castling_modules(model)))
    as_built = sum(parameter.numel() for parameter in model.parameters())
    assert (attentions > 0) == ("castling" in name)
    for hook in cfg.get("custom_hooks", []):
        HOOKS.build(hook)
    if attentions or "softmax" in name:
        # What is built deployed has the parameters that deploying leaves.
        deployed = MODELS.build(deploy_config(cfg).model)
        assert not list(castling_modules(deployed))
        deployed.load_state_dict(switch_to_deploy(model, inplace=True).state_dict())
    if not attentions:
        return as_built
    return sum(parameter.numel() for parameter in deployed.parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_castles_decays_its_masks(path):
    cfg = load(path)
    hooks = [hook["type"] for hook in cfg.get("custom_hooks", [])]
    castles = "castling" in path.stem
    if castles and "dinov2" in path.stem:  # aligned: its masks are off from the start
        assert cfg.model.backbone.attention.mask_threshold == 1.0
        castles = False
    assert ("MaskDecayHook" in hooks) == castles


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_rate_of_the_backbone_is_that_of_all_its_weights(path):
    cfg = load(path)
    options = cfg.get("optim_wrapper", {}).get("paramwise_cfg", {})
    keys = options.get("custom_keys", {})
    if "backbone" not in keys:
        pytest.skip("one rate for all")
    # The longest key that a weight's name contains is the one that holds for it.
    rates = {
        name: keys[max((key for key in keys if key in name), key=len)]["lr_mult"]
        for name in ("backbone.pos_embed", "backbone.cls_token", "backbone.ln1.bias")
    }
    assert set(rates.values()) == {keys["backbone"]["lr_mult"]}
    schedule = cfg.param_scheduler[-1]  # whose end is one for all weights
    assert schedule.eta_min <= 0.1 * cfg.optim_wrapper.optimizer.lr * min(
        rates.values()
    )


def test_the_softmax_twin_differs_in_its_attention_only():
    changed = differences("mask_rcnn_softmax_s_coco.py")
    assert all(
        key.startswith("model.backbone.attention.") or key == "custom_hooks"
        for key in changed
    )
    assert load("mask_rcnn_softmax_s_coco.py").model.backbone.attention == dict(
        type="softmax"
    )


@pytest.mark.parametrize("size", ["s", "mvit_t"])
def test_the_twins_for_segmentation_differ_in_their_attention(size):
    twins = [f"upernet_{kind}_{size}_ade20k.py" for kind in ("softmax", "castling")]
    own = ("model.backbone.attention", "custom_hooks")
    if size == "mvit_t":  # the published MViTv2
        own += (
            "model.backbone.ffn_conv",
            "optim_wrapper.paramwise_cfg.custom_keys.rel",
        )
    changed = differences(*twins)
    assert changed and all(key.startswith(own) for key in changed), changed


@pytest.mark.parametrize("size", ["s", "mvit_t"])
def test_semantic_fpn_differs_from_upernet_in_its_heads_only(size):
    heads = [f"{head}_castling_{size}_ade20k.py" for head in ("fpn", "upernet")]
    own = ("model.decode_head.", "model.auxiliary_head", "model.neck.")
    changed = differences(*heads)
    assert changed and all(key.startswith(own) for key in changed), changed


def test_ade20k_is_trained_for_160k_iterations_of_16_crops():
    names = [path.name for path in CONFIGS if path.stem.endswith("ade20k")]
    assert len(names) == 8
    for name in names:
        cfg = load(name)
        assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == 160_000
        assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size
        assert tuple(cfg.model.data_preprocessor.size) == (512, 512)
        assert cfg.model.decode_head.num_classes == 150


def test_the_local_attention_twin_keeps_data_and_schedule():
    changed = differences("mask_rcnn_swin_t_coco.py")
    assert changed
    own = ("model.backbone.", "model.neck.", "optim_wrapper.", "custom_hooks")
    assert all(key.startswith(own) for key in changed), changed
    twins = [load(name) for name in ("mask_rcnn_swin_t_coco.py", MAIN)]
    for key in ("train_dataloader", "param_scheduler", "train_cfg", "auto_scale_lr"):
        assert twins[0][key] == twins[1][key]
    assert twins[0].optim_wrapper.optimizer == twins[1].optim_wrapper.optimizer
    augments = [twin.model.data_preprocessor.batch_augments for twin in twins]
    assert augments[0] == augments[1]


def test_vit_b_has_vitdets_heads():
    heads = load("mask_rcnn_castling_b_coco.py").model
    assert heads.rpn_head.num_convs == 2
    assert heads.roi_head.bbox_head.type == "Shared4Conv1FCBBoxHead"
    own = ("model.", "optim_wrapper.paramwise_cfg.layer_decay_rate", "norm_cfg")
    changed = differences("mask_rcnn_castling_b_coco.py")
    assert changed and all(key.startswith(own) for key in changed), changed


def test_the_short_schedule_differs_in_its_schedule_only():
    changed = differences("mask_rcnn_castling_s_1x_coco.py")
    schedule = ("max_", "val_interval", "train_cfg.", "param_scheduler")
    schedule += ("default_hooks.checkpoint.interval",)
    assert changed and all(key.startswith(schedule) for key in changed), changed


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_schedule_steps_after_the_end_of_training(path):
    cfg = load(path)
    steps = [s for s in cfg.param_scheduler if s["type"] == "MultiStepLR"]
    for scheduler in steps:
        unit = "max_epochs" if scheduler.get("by_epoch", True) else "max_iters"
        if unit in cfg.train_cfg:
            assert max(scheduler["milestones"]) < cfg.train_cfg[unit]
            assert scheduler["end"] == cfg.train_cfg[unit]


def test_schedules_on_coco_are_the_arithmetic_of_their_comments():
    images = 117_266  # of train2017, with annotations
    # ViTDet's 64 images: 1e-4, steps after 163,889 and 177,546 of 184,375 iterations.
    for name, epochs, validated, steps, lr, per in (
        (MAIN, 100, 5, (163_889 / 184_375, 177_546 / 184_375), 1e-4, 64),
        ("mask_rcnn_castling_s_1x_coco.py", 12, 1, (8 / 12, 11 / 12), 1e-4, 64),
        (
            "mask_rcnn_castling_mvit_t_coco.py",
            67_500 * 64 / images,
            22_500 * 16 / images,
            (52_500 / 67_500, 62_500 / 67_500),
            1.6e-4,
            64,
        ),
    ):
        cfg = load(name)
        batch = 8 * cfg.train_dataloader.batch_size
        assert batch == cfg.auto_scale_lr.base_batch_size == 16
        total = epochs * images / batch
        assert cfg.train_cfg.max_iters == pytest.approx(total, abs=1)
        interval = validated * images / batch
        assert cfg.train_cfg.val_interval == pytest.approx(interval, abs=1)
        assert cfg.default_hooks.checkpoint.interval == cfg.train_cfg.val_interval
        warm_up, decay = cfg.param_scheduler
        assert warm_up.end == 250 * 64 / batch
        expected = [share * total for share in steps]
        assert list(decay.milestones) == pytest.approx(expected, abs=1)
        assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr * batch / per)
    cfg = load("retinanet_castling_levit_256_coco.py")
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.param_scheduler[0].end == 500
    assert list(cfg.param_scheduler[1].milestones) == [8, 11]
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size
    assert cfg.optim_wrapper.optimizer.lr == 1e-4
    cfg = load("rtmdet_castling_levit_256_coco.py")
    assert (cfg.train_cfg.max_epochs, cfg.train_dataloader.batch_size) == (300, 32)
    cosine = cfg.param_scheduler[1]
    assert (cosine.begin, cosine.end) == (150, 300)
    assert cfg.optim_wrapper.optimizer.lr == 4e-3 == cosine.eta_min * 20
    switch = next(h for h in cfg.custom_hooks if h["type"] == "PipelineSwitchHook")
    assert switch["switch_epoch"] == 280


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_name_no_absolute_path(path):
    texts = [value for _, value in flat(load(path)._cfg_dict.to_dict())]
    assert texts
    assert not [text for text in texts if isinstance(text, str) and text[:1] == "/"]


def test_what_ships_names_no_folder_of_a_developer():
    files = [
        path
        for folder in ("mmcastling", "configs", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".sh", ".md", ".json", ".yml")
    ]
    assert len(files) > 40
    pattern = re.compile(r"\.\./shared|[\"' =](/root|/home|/work|/tmp|/data)\b")
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in files
        if (match := pattern.search(path.read_text(encoding="utf-8")))
    }
    assert not found
