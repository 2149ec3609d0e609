"""tools/analysis/show_attention.py: pictures of attention, and what it refuses."""

import cv2
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from mmcastling.run import load_config
from mmcastling.run.load import build_model
from mmcastling.run.show_attention import click_point, view_attention
from mmcastling.runtime.images import read_image
from mmcastling.verbs import MASK_META_KEY, set_mask, switch_to_deploy

TOOL = "analysis/show_attention.py"
IMPORTS = 'custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)\n'
BACKBONE = """
arch = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=40)
backbone = dict(type="mmcastling.CastlingViT", arch=arch, patch_size=8, img_size=32)
"""
# The short side becomes 48, and the middle 32x32 are cut out.
CLASSIFIER = (
    IMPORTS
    + BACKBONE
    + """
default_scope = "mmpretrain"
model = dict(
    type="ImageClassifier",
    backbone=backbone,
    head=dict(type="VisionTransformerClsHead", num_classes=2, in_channels=24),
    data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3, to_rgb=True),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=48, edge="short", backend="pillow",
         interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=32),
    dict(type="PackInputs"),
]
dataset = dict(type="CustomDataset", data_root="", pipeline=pipeline)
test_dataloader = dict(batch_size=1, dataset=dataset)
"""
)
SEGMENTOR = (
    IMPORTS
    + BACKBONE
    + """
default_scope = "mmseg"
backbone.update(with_cls_token=False, out_type="featmap")
model = dict(
    type="EncoderDecoder",
    backbone=backbone,
    decode_head=dict(type="FCNHead", in_channels=24, channels=8, num_convs=1,
                     concat_input=False, num_classes=3, norm_cfg=None),
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[120.0] * 3,
                           std=[60.0] * 3, bgr_to_rgb=True, size=(32, 32),
                           test_cfg=dict(size_divisor=16)),
    test_cfg=dict(mode="slide", crop_size=(32, 32), stride=(16, 16)),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
dataset = dict(type="BaseSegDataset", data_root="", pipeline=pipeline)
test_dataloader = dict(batch_size=1, dataset=dataset)
"""
)


@pytest.fixture
def make(tmp_path):
    """A config, a checkpoint of its model with random weights, and a model."""

    def make(text, deploy=False, threshold="0.5/N"):
        config = tmp_path / "made_up.py"
        config.write_text(text)
        cfg = load_config(config)
        torch.manual_seed(0)
        model = build_model(cfg)
        set_mask(model, threshold)
        meta = {MASK_META_KEY: dict(threshold=threshold, weight=1.0)}
        if deploy:
            switch_to_deploy(model, inplace=True)
            meta = dict(deploy=True)
        path = tmp_path / "made_up.pth"
        torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
        return config, path

    return make


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """72 wide, 60 high, of noise."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    noise = np.random.default_rng(0).integers(0, 255, (60, 72, 3), np.uint8)
    cv2.imwrite(str(path), noise)
    return path


# -------------------------------------------------------------------- where a point is


def marked(point, size=(60, 72)):
    """A dark image with a bright blob around a point."""
    y, x = np.mgrid[: size[0], : size[1]]
    distance = (x - point[0]) ** 2 + (y - point[1]) ** 2
    return np.repeat(np.where(distance < 9, 255, 0)[..., None], 3, 2).astype(np.uint8)


@pytest.mark.parametrize("text", [CLASSIFIER, SEGMENTOR], ids=["crop", "resize"])
@pytest.mark.parametrize("point", [(36, 30), (22, 40), (50, 21)])
def test_a_point_is_followed_through_the_test_pipeline(text, point, make):
    config, checkpoint = make(text)
    view = view_attention(load_config(config), checkpoint, marked(point), point)
    y, x = np.nonzero(view.image.mean(axis=2) > 128)
    assert view.point == pytest.approx((x.mean(), y.mean()), abs=0.6)
    row, column = divmod(view.query - view.call.extra_tokens, view.call.grid[1])
    assert (row, column) == (view.point[1] // 8, view.point[0] // 8)


def test_flipped_and_padded_images_are_followed_too(make):
    steps = 'dict(type="RandomFlip", prob=1.0), dict(type="Pad", size=(128, 80)),\n'
    load = '    dict(type="LoadAnnotations")'
    config, checkpoint = make(SEGMENTOR.replace(load, f"    {steps}{load}"))
    view = view_attention(load_config(config), checkpoint, marked((20, 40)), (20, 40))
    y, x = np.nonzero(view.image.mean(axis=2) > 128)
    assert view.point == pytest.approx((x.mean(), y.mean()), abs=0.6)
    assert view.image.shape == (80, 128, 3)


def test_a_point_that_is_cut_off_is_refused(make, picture):
    config, checkpoint = make(CLASSIFIER)
    image = read_image(picture)
    with pytest.raises(ValueError, match=r"point 2 30 .* test pipeline .* cuts off"):
        view_attention(load_config(config), checkpoint, image, (2, 30))


def test_a_pipeline_that_cannot_be_followed_is_refused(make, picture):
    step = 'dict(type="BioMedicalGaussianNoise", prob=1.0, mean=0, std=300.0),\n'
    load = '    dict(type="LoadAnnotations")'
    config, checkpoint = make(SEGMENTOR.replace(load, f"    {step}{load}"))
    with pytest.raises(ValueError, match=r"cannot be followed: leave all but resizing"):
        view_attention(load_config(config), checkpoint, read_image(picture), (2, 30))


# ------------------------------------------------------------------------ the masks


def test_masks_are_those_of_the_checkpoint_or_of_the_threshold(make, picture):
    config, checkpoint = make(CLASSIFIER, threshold="0.5/N")
    cfg, image = load_config(config), read_image(picture)
    view = view_attention(cfg, checkpoint, image, (36, 30))
    assert (str(view.threshold), view.own_threshold) == ("0.5/N", True)
    kept = view.rows.softmax[view.rows.softmax > 0.5 / 17]
    assert len(kept) and view.survivors > 0
    other = view_attention(cfg, checkpoint, image, (36, 30), threshold="0.0")
    assert (other.survivors, other.own_threshold) == (1.0, False)
    assert torch.equal(other.rows.masked, other.rows.softmax)
    head = view_attention(cfg, checkpoint, image, (36, 30), head=2, layer=0)
    assert (head.heads, head.call.name) == ("head 2", "backbone.layers.0.attn")


def test_deployed_checkpoints_show_what_a_mask_would_keep(make, picture):
    config, checkpoint = make(CLASSIFIER, deploy=True)
    cfg, image = load_config(config), read_image(picture)
    view = view_attention(cfg, checkpoint, image, (36, 30))
    assert view.call.mixer.deploy and view.survivors == 0
    assert torch.equal(view.rows.combined, view.rows.angular)
    view = view_attention(cfg, checkpoint, image, (36, 30), threshold="0.5/N")
    assert view.survivors > 0


# ------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("text", "deploy", "arguments", "said"),
    [
        (CLASSIFIER, False, ["--head", "1"], "a grid of 4x4"),
        (CLASSIFIER, True, ["--layer", "0"], "branch was pruned"),
        (SEGMENTOR, True, ["--threshold", "1/N", "--head", "mean"], "a grid of 8x10"),
    ],
    ids=["classifier", "deployed", "segmentor"],
)
def test_command_writes_a_picture(
    text, deploy, arguments, said, make, picture, run_main, tmp_path
):
    config, checkpoint = make(text, deploy)
    out = tmp_path / "out.png"
    arguments = ["--point", 36, 30, "--out", out, *arguments]
    done = run_main(TOOL, picture, config, checkpoint, *arguments)
    assert done.returncode in (0, None), done.stderr
    assert said in done.stdout and f"wrote {out}" in done.stdout
    drawn = cv2.imread(str(out))
    assert drawn.shape[1] == 5 * 330 and drawn.std() > 20


@pytest.mark.slow
def test_detectors_on_real_images(trained, tiny_coco, run_main, tmp_path):
    image = min((tiny_coco / "val2017").iterdir())
    for checkpoint in (trained.masks_on, trained.masks_off):
        out = tmp_path / f"{checkpoint.stem}.png"
        arguments = [trained.config, checkpoint, "--point", 100, 100, "--out", out]
        done = run_main(TOOL, image, *arguments)
        assert done.returncode in (0, None), done.stderr
        assert "a grid of 16x16" in done.stdout
        empty = checkpoint == trained.masks_off
        assert ("no pair survives" in done.stdout) == empty
        assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (dict(point=(72, 10)), ["point 72 10 is outside", "72x60", "x from 0 to 71"]),
        (dict(point=(3, -1)), ["point 3 -1 is outside"]),
        (dict(layer=2), ["layer 2 does not exist", "0 to 1"]),
        (dict(head=3), ["head 3 does not exist", "0 to 2"]),
        (dict(threshold="4/M"), ["'4/M' is not understood"]),
        (dict(image="none.png"), ["none.png does not exist"]),
        (dict(image="damaged.png"), ["damaged.png (4 bytes) cannot be read"]),
        (dict(checkpoint="none.pth"), ["none.pth does not exist"]),
        (dict(out="none/a.png"), ["none does not exist, create it first"]),
        (dict(out="a.jpg"), ["end the name in .png"]),
        (dict(softmax=True), ["has no castling attention in its backbone"]),
        (dict(pipeline=False), ["has no test_dataloader with a pipeline"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_paragraph_and_nothing_is_written(
    changes, parts, make, picture, run_main, tmp_path
):
    text = CLASSIFIER
    config, checkpoint = make(text)
    if changes.get("softmax"):
        text = text.replace(
            "img_size=32)", 'img_size=32, attention=dict(type="softmax"))'
        )
        config.write_text(text)
        model = build_model(load_config(config))
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
    if changes.get("pipeline") is False:
        config.write_text(text.split("test_dataloader")[0])
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
    image = tmp_path / changes["image"] if "image" in changes else picture
    if "checkpoint" in changes:
        checkpoint = tmp_path / changes["checkpoint"]
    before = sorted(tmp_path.rglob("*"))
    options = ["--point", *changes.get("point", (36, 30))]
    options += ["--out", tmp_path / changes.get("out", "a.png")]
    for name in ("layer", "head", "threshold"):
        if name in changes:
            options += [f"--{name}", changes[name]]
    done = run_main(TOOL, image, config, checkpoint, *options)
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in message
    assert sorted(tmp_path.rglob("*")) == before


def test_point_and_click_exclude_each_other(picture, run_main):
    for options in ([], ["--click", "--point", "1", "2"], ["--point", "1"]):
        done = run_main(TOOL, picture, "a.py", "a.pth", *options)
        assert done.returncode == 2 and "usage: " in done.stderr


# ------------------------------------------------------------------------- clicking


def test_clicking_without_a_display_says_what_to_do(picture):
    pyplot.switch_backend("agg")
    with pytest.raises(ValueError, match=r"--click needs a display .* --point X Y"):
        click_point(read_image(picture))


@pytest.mark.parametrize("clicks", [[(12.5, 30.0)], []])
def test_a_click_is_the_point_and_a_closed_window_an_error(
    clicks, picture, monkeypatch
):
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "get_backend", lambda: "TkAgg")
    monkeypatch.setattr(pyplot, "ginput", lambda count, timeout: clicks)
    if clicks:
        assert click_point(read_image(picture)) == (12.5, 30.0)
    else:
        with pytest.raises(ValueError, match=r"no point was clicked"):
            click_point(read_image(picture))
    assert not pyplot.get_fignums()
