"""Segmentation: every recipe trains and predicts, and the commands on real scenes."""

import copy
import json
import math
import pickle
import re
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import timm
import torch
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS, MODELS, init_default_scope

from mmcastling.checkpoint import load_checkpoint
from mmcastling.run import evaluate, load_config, train
from mmcastling.run.testing import enable_output, enable_tta
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

pytestmark = pytest.mark.slow

# That on MAE's weights is trained in test_castled_recipes.py.
CONFIGS = (Path(__file__).resolve().parents[2] / "configs").glob("*_ade20k.py")
ADE20K = sorted(path.stem for path in CONFIGS if "_mae_" not in path.stem)

# The configs as they are, 150 classes included, but for the size of images and batches,
# and the width of heads, most of whose time goes into their initial weights.
SMALL = """
_base_ = [{base!r}]
crop_size = (64, 96)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(120, 90), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline), **loader)
test_dataloader = dict(dataset=dict(pipeline=test_pipeline), **loader)
model = dict(
    data_preprocessor=dict(size=crop_size), backbone=dict(img_size=crop_size)
)
train_cfg = dict(max_iters=1, val_interval=9)
val_dataloader = val_cfg = val_evaluator = None
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=1))
"""
NARROW = """
model['decode_head'] = dict(channels=64)
"""
SLIDING = """
model['test_cfg'] = dict(mode="slide", crop_size=crop_size, stride=(43, 64))
"""
# Mask2Former with a backbone of the demo's size, whose weights the importer has made.
MASK2FORMER = """
model['backbone'].update(arch="nano", init_cfg=dict(checkpoint={weights!r}))
model['neck'] = dict(in_channels=128)
model['decode_head'] = dict(train_cfg=dict(num_points=256))
"""


@pytest.fixture(scope="module")
def ade20k(make_scenes, tmp_path_factory):
    """Road scenes in ADE20K's layout: 0 is no class, 1 to 11 the first of 150."""
    folder = tmp_path_factory.mktemp("data") / "ade"
    return make_scenes(folder, frames=2, splits=("training", "validation"))


@pytest.fixture
def mae(run_main, tmp_path):
    """Weights under the names of MAE's release, imported as the config says."""
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        embed_dim=128, depth=4, num_heads=4, num_classes=0
    )
    weights = dict(
        model.state_dict(),
        mask_token=torch.zeros(1, 1, 64),
        **{"decoder_embed.weight": torch.zeros(64, 128)},
    )
    torch.save({"model": weights}, tmp_path / "mae_pretrain.pth")
    out = tmp_path / "mae.pth"
    options = ("--arch", "nano", "--img-size", 64, 96)
    tool = "model_converters/import_vit.py"
    done = run_main(tool, tmp_path / "mae_pretrain.pth", out, *options)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", ADE20K)
@pytest.mark.long
def test_every_recipe_trains_an_iteration_and_predicts(
    name, root, ade20k, tmp_path, request
):
    config = tmp_path / f"small_{name}.py"
    text = SMALL.format(base=str(root / "configs" / f"{name}.py"))
    if "mask2former" in name:
        weights = request.getfixturevalue("mae")
        text += MASK2FORMER.format(weights=str(weights))
    else:
        text += NARROW if "mvit" in name else NARROW + SLIDING
    config.write_text(text)
    cfg = load_config(config, dict(data_root=str(ade20k)), work_dir=str(tmp_path / "w"))
    model = train(cfg)
    scalars = {
        key.removeprefix("train/"): value.current()
        for key, value in MessageHub.get_current_instance().log_scalars.items()
    }
    assert math.isfinite(scalars["loss"]) and scalars["loss"] > 0
    assert all(p.isfinite().all() for p in model.parameters())
    castled = list(castling_modules(model))
    assert bool(castled) == ("castling" in name)
    assert not any(module.mask_is_on for _, module in castled)
    if "mask2former" in name:
        # Nothing but one step with a hundredth of 1e-4 lies between.
        held = load_checkpoint(weights)["state_dict"]["backbone.layers.0.ln1.bias"]
        own = model.backbone.layers[0].ln1.bias
        assert torch.allclose(own, held, atol=1e-4)
        rates = {
            name: group["lr"]
            for group in load_checkpoint(tmp_path / "w/iter_1.pth")["optimizer"][
                "param_groups"
            ]
            for name in group["param_names"]
        }
        assert rates["backbone.pos_embed"] == pytest.approx(1e-4 * 0.7**5)
        assert rates["decode_head.query_feat.weight"] == pytest.approx(1e-4)

    enable_output(cfg, str(tmp_path / "out.pkl"))
    result = evaluate(cfg, tmp_path / "w/iter_1.pth")
    assert 0 <= result.metrics["mIoU"] <= 100
    assert bool(result.pruning) == bool(castled)
    for item in pickle.loads((tmp_path / "out.pkl").read_bytes()):
        labels = item["pred_sem_seg"]["data"]
        assert labels.shape == (1, 90, 120) and labels.max() < 150


# -- the CamVid config, and the commands -----------------------------------------------


def test_the_camvid_config_trains_with_averaged_weights(trained_segmentor):
    (log,) = trained_segmentor.work_dir.glob("*/*.log")
    text = log.read_text()
    assert "mask_weight: 0.2593" in text
    assert re.search(r"\| +bicyclist +\|", text) and "mIoU" in text
    assert "ema_state_dict" in load_checkpoint(trained_segmentor.masks_off)


def test_void_counts_neither_in_the_loss_nor_in_the_metric(
    trained_segmentor, make_scenes, tmp_path
):
    cfg = load_config(trained_segmentor.config)
    init_default_scope("mmseg")
    head = MODELS.build(copy.deepcopy(cfg.model)).decode_head
    sample = DATASETS.build(cfg.test_dataloader.dataset)[0]["data_samples"]
    sample.gt_sem_seg.data = torch.full((1, 90, 120), cfg.void)
    assert head.loss_by_feat(torch.randn(1, 11, 9, 12), [sample])["loss_ce"] == 0
    sample.gt_sem_seg.data[0, 0, 0] = 3
    assert head.loss_by_feat(torch.randn(1, 11, 9, 12), [sample])["loss_ce"] > 0
    # Frames of which all but a corner is void: that corner is all that is counted.
    folder = make_scenes(tmp_path / "void", frames=1)
    for path in (folder / "annotations/val").iterdir():
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        label[:], label[:9, :9] = 11, 3
        cv2.imwrite(str(path), label)
    cfg = load_config(
        trained_segmentor.config, dict(data_root=str(folder)), str(tmp_path / "w")
    )
    enable_output(cfg, str(tmp_path / "out.pkl"))
    metrics = evaluate(cfg, trained_segmentor.masks_off).metrics
    json.dumps(metrics)  # plain numbers
    (item,) = pickle.loads((tmp_path / "out.pkl").read_bytes())
    corner = item["pred_sem_seg"]["data"][0, :9, :9]
    share = (corner == 3).float().mean().item()
    assert metrics["aAcc"] == pytest.approx(100 * share, abs=0.01)


def test_a_checkpoint_is_converted_and_evaluated_alike(
    trained_segmentor, run_main, printed_difference, tmp_path
):
    out = tmp_path / "deployed.pth"
    converted = run_main(
        *("convert.py", trained_segmentor.config, trained_segmentor.masks_off, out),
    )
    assert converted.returncode == 0, converted.stderr
    assert printed_difference(converted.stdout) < 1e-4
    found = {}
    for name, config, checkpoint in (
        ("trained", trained_segmentor.config, trained_segmentor.masks_off),
        ("deployed", out.with_suffix(".py"), out),
    ):
        tested = run_main(
            *("test.py", config, checkpoint, "--work-dir", tmp_path / name),
            *("--out", tmp_path / f"{name}.pkl", "--show-dir", tmp_path / "painted"),
        )
        assert tested.returncode == 0, tested.stderr
        assert "mIoU" in tested.stdout
        said = {
            "trained": "pruned the auxiliary softmax branch of 4 attentions",
            "deployed": "pruned nothing: it was deployed before",
        }[name]
        table = re.search(r"\| +pedestrian +\|", tested.stdout)
        assert 0 < tested.stdout.find(said) < table.start()
        found[name] = [
            item["seg_logits"]["data"]
            for item in pickle.loads((tmp_path / f"{name}.pkl").read_bytes())
        ]
    assert len(found["trained"]) == 4
    torch.testing.assert_close(found["deployed"], found["trained"])
    assert len(list((tmp_path / "painted").rglob("*.png"))) >= 4


def test_pruning_early_changes_what_a_segmentor_predicts(trained_segmentor):
    cfg = load_config(trained_segmentor.config)
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    weights = load_checkpoint(trained_segmentor.masks_on)["state_dict"]
    model.load_state_dict(weights)
    image = torch.randn(1, 3, 90, 120)
    set_mask(model, "0.5/N")
    with torch.no_grad():
        on, pruned = model(image), switch_to_deploy(model)(image)
        set_mask(model, 1.0)
        off = model(image)
    torch.testing.assert_close(off, pruned)
    assert (on - pruned).abs().max() > 1e-3


@pytest.fixture(scope="module")
def deployed(trained_segmentor):
    """The pruned segmentor, and what its test frames become on the way to it."""
    cfg = load_config(trained_segmentor.config)
    init_default_scope("mmseg")
    model = MODELS.build(copy.deepcopy(cfg.model)).eval()
    weights = load_checkpoint(trained_segmentor.masks_off)["state_dict"]
    model.load_state_dict(weights)
    frames = DATASETS.build(cfg.test_dataloader.dataset)
    return switch_to_deploy(model), [frames[i] for i in range(len(frames))]


def predicted(model, frames, **test_cfg):
    """Class ids of each frame, predicted with other options of testing."""
    model = copy.deepcopy(model)
    model.test_cfg.update(test_cfg)
    with torch.no_grad():
        samples = [
            model.test_step(pseudo_collate([copy.deepcopy(frame)]))[0]
            for frame in frames
        ]
    return [sample.pred_sem_seg.data[0] for sample in samples]


def test_a_sliding_window_covers_the_frame(deployed):
    model, frames = deployed

    def slide(*size):
        return predicted(model, frames, mode="slide", crop_size=size, stride=size)

    whole, one, four = predicted(model, frames), slide(90, 120), slide(45, 60)
    assert all(torch.equal(a, b) for a, b in zip(whole, one, strict=True))
    assert {tuple(labels.shape) for labels in four} == {(90, 120)}
    # Each window is the network's answer to that part of the frame alone.
    image = model.data_preprocessor(dict(inputs=[frames[0]["inputs"]]))["inputs"]
    with torch.no_grad():
        metas = [dict(ori_shape=(45, 60), img_shape=(45, 60))]
        corner = model.encode_decode(image[..., 45:, 60:], metas).argmax(1)[0]
    assert torch.equal(four[0][45:, 60:], corner)


def test_test_time_augmentation_compares_with_the_truth_as_it_is(
    trained_segmentor, deployed, tmp_path
):
    config, checkpoint = trained_segmentor.config, trained_segmentor.masks_off
    cfg = load_config(config)
    enable_tta(cfg)
    init_default_scope("mmseg")
    views = DATASETS.build(cfg.test_dataloader.dataset)[0]
    assert [s.flip for s in views["data_samples"]] == [True, False]
    truth = mmcv.imread(views["data_samples"][0].seg_map_path, "unchanged")
    for sample in views["data_samples"]:
        assert np.array_equal(sample.gt_sem_seg.data[0].numpy(), truth)
    assert torch.equal(views["inputs"][0], views["inputs"][1].flip(-1))

    enable_output(cfg, str(tmp_path / "out.pkl"))
    cfg.work_dir = str(tmp_path / "work")
    metrics = evaluate(cfg, checkpoint).metrics
    assert set(metrics) == {"aAcc", "mIoU", "mAcc"}
    # The mean of what the frame and its mirror image are taken for.
    model, frames = deployed
    merged = pickle.loads((tmp_path / "out.pkl").read_bytes())[0]["pred_sem_seg"]
    image = model.data_preprocessor(dict(inputs=[frames[0]["inputs"]]))["inputs"]
    with torch.no_grad():
        metas = [dict(ori_shape=(90, 120), img_shape=(90, 120))]
        as_is = model.encode_decode(image, metas).softmax(1)
        mirrored = model.encode_decode(image.flip(-1), metas).softmax(1).flip(-1)
    expected = (as_is + mirrored).argmax(1)
    assert (merged["data"] == expected).float().mean() > 0.999


# -- bad input -------------------------------------------------------------------------


@pytest.fixture
def refused(run_main, tmp_path, segmentor_config):
    """Both commands must refuse the data, and write nothing."""

    def run(folder, *parts, options=(), commands=("train.py", "test.py")):
        for command in commands:
            rest = ("a.pth",) if command == "test.py" else ()
            done = run_main(
                *(command, segmentor_config, *rest, "--work-dir", tmp_path / "work"),
                *("--cfg-options", f"data_root={folder}", *options),
            )
            assert done.returncode == 1 and "Traceback" not in done.stderr
            for part in ("error: ", *parts):
                assert part in done.stderr, (part, done.stderr)
            assert not (tmp_path / "work").exists()

    return run


def test_a_label_outside_the_classes(refused, make_scenes, tmp_path):
    folder = make_scenes(tmp_path / "scenes", frames=2)
    for split, command in (("val", "test.py"), ("train", "train.py")):
        path = sorted((folder / "annotations" / split).iterdir())[1]
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        label[3, 4] = 30
        cv2.imwrite(str(path), label)
        parts = ["holds 30 (1 pixels)", "0 to 10 for the 11 classes, or 11 where"]
        refused(folder, f"{split}/{path.name}", *parts, commands=[command])
    # Without saying that 11 is void, it is no class either.
    options = ("model.decode_head.ignore_index=255",)
    refused(folder, "holds 11 (", "or 255 where nothing", options=options)


def test_a_label_map_of_another_size(refused, make_scenes, tmp_path):
    folder = make_scenes(tmp_path / "scenes", frames=2)
    path = sorted((folder / "annotations/val").iterdir())[0]
    label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), label[::2, ::2])
    refused(folder, path.name, "is 60x45", "120x90", "expected equal sizes")


def test_a_missing_split(refused, make_scenes, tmp_path):
    folder = make_scenes(tmp_path / "scenes", frames=1, splits=("train", "valid"))
    refused(folder, "images/val does not exist", "holds 'train', 'valid'")
    parts = ["annotations/valid does not exist", "data_prefix"]
    (folder / "annotations/valid").rename(folder / "annotations/val")
    options = ("test_dataloader.dataset.data_prefix.img_path=images/valid",)
    options += ("test_dataloader.dataset.data_prefix.seg_map_path=annotations/valid",)
    refused(folder, *parts, options=options, commands=["test.py"])
    options = ("train_dataloader.dataset.ann_file=train.txt",)
    refused(folder, "list", "train.txt", options=options, commands=["train.py"])


def test_heads_of_another_number_of_classes(refused, scenes):
    parts = ["decode_head.num_classes is 19, but the data has 11 classes"]
    refused(scenes, *parts, options=["model.decode_head.num_classes=19"])


def test_missing_data_says_how_to_get_it(run_main, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, parts in (
        ("upernet_castling_nano_camvid.py", ["data/camvid", "SegNet"]),
        (
            "upernet_castling_s_ade20k.py",
            ["get ADE20K", "FOLDER/ade/ADEChallengeData2016"],
        ),
    ):
        done = run_main("train.py", root / "configs" / name)
        assert done.returncode == 1
        for part in (*parts, "data_root=FOLDER", "MMCASTLING_DATA"):
            assert part in done.stderr


def test_missing_pretrained_weights_are_named(root, ade20k, run_main, tmp_path):
    done = run_main(
        *("train.py", root / "configs/mask2former_castling_b_ade20k.py"),
        *("--work-dir", tmp_path / "work", "--cfg-options", f"data_root={ade20k}"),
        *("model.backbone.arch=nano", "model.neck.in_channels=128"),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "weights/mae_vit_base_512.pth" in done.stderr
