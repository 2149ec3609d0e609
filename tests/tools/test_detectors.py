"""The detectors on hierarchical backbones, trained and tested on real COCO images."""

import re

import pytest

# The configs as they are, but for image size, batch size and number of iterations.
SMALL = """
_base_ = [{base!r}]
size = (160, 192)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=size, keep_ratio=False),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
loader = dict(num_workers=0, persistent_workers=False, batch_size=1)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline), **loader)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, indices=4), **loader)
test_dataloader = val_dataloader
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2, val_interval=9)
val_dataloader = val_cfg = val_evaluator = None
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))
log_processor = dict(by_epoch=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn_{}_mvit_t", "retinanet_{}_levit_256"])
@pytest.mark.parametrize("kind", ["castling", "softmax"])
def test_trains_and_evaluates_on_coco(
    root, tiny_coco, run_main, tmp_path, detector, kind
):
    base = root / "configs" / f"{detector.format(kind)}_coco.py"
    config = tmp_path / "small.py"
    config.write_text(SMALL.format(base=str(base)))
    common = ("--work-dir", tmp_path, "--cfg-options", f"data_root={tiny_coco}")
    done = run_main("train.py", config, *common)
    assert done.returncode == 0, done.stderr
    done = run_main("test.py", config, tmp_path / "iter_2.pth", *common)
    assert done.returncode == 0, done.stderr
    pruned = re.search(r"pruned the auxiliary softmax branch of (\d+)", done.stdout)
    assert bool(pruned) == (kind == "castling")
    if kind == "softmax":
        assert "nothing is castled" in done.stdout
