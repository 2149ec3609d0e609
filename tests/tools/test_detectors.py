"""The detectors on hierarchical backbones, trained and tested on real COCO images."""

import json
import re

import pytest

from mmcastling.checkpoint import load_checkpoint

ATTENTIONS = {"mask_rcnn_{}_mvit_t": 8, "retinanet_{}_levit_256": 14}

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
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=2), logger=dict(interval=2)
)
log_processor = dict(by_epoch=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["mask_rcnn_{}_mvit_t", "retinanet_{}_levit_256"])
@pytest.mark.parametrize("kind", ["castling", "softmax"])
@pytest.mark.long
def test_trains_and_evaluates_on_coco(
    root, tiny_coco, run_main, printed_difference, tmp_path, detector, kind
):
    base = root / "configs" / f"{detector.format(kind)}_coco.py"
    config = tmp_path / "small.py"
    config.write_text(SMALL.format(base=str(base)))
    # Without a threshold of scores an untrained detector still predicts; a few boxes.
    test_cfg = "model.test_cfg"
    options = [f"data_root={tiny_coco}"]
    if "mask_rcnn" in detector:
        proposals = ("test_cfg.rpn", "train_cfg.rpn_proposal")
        options += [f"model.{name}.max_per_img=50" for name in proposals]
        test_cfg += ".rcnn"
    options += [f"{test_cfg}.score_thr=0.0", f"{test_cfg}.max_per_img=20"]
    common = ("--work-dir", tmp_path, "--cfg-options", *options)
    done = run_main("train.py", config, *common)
    assert done.returncode == 0, done.stderr
    done = run_main("test.py", config, tmp_path / "iter_2.pth", *common)
    assert done.returncode == 0, done.stderr
    if kind == "castling":
        said = "pruned the auxiliary softmax branch of "
        assert f"{said}{ATTENTIONS[detector]} attentions" in done.stdout
        # Training has ended, so the masks are off: norms are folded, no more changes.
        saved = float(re.search(r"with the branch on \(-([\d.]+)%\)", done.stdout)[1])
        assert 0 < saved < 60
        assert printed_difference(done.stdout) < 1e-3
        assert "masks of this checkpoint have not decayed" not in done.stdout
    else:
        assert "pruned nothing: nothing is castled" in done.stdout
    # Two iterations learn nothing, but all that the metric has is there.
    kinds = ("bbox", "segm") if "mask_rcnn" in detector else ("bbox",)
    for metric in (f"coco/{each}_mAP" for each in kinds):
        value = float(re.search(rf"{metric}: +(-?[\d.]+)", done.stdout)[1])
        assert 0 <= value < 0.5
    assert ("coco/segm_mAP" in done.stdout) == ("segm" in kinds)
    record = json.loads(next(tmp_path.glob("*/vis_data/scalars.json")).read_text())
    assert 0 < record["loss"] < 20 and record["iter"] == 2
    weights = load_checkpoint(tmp_path / "iter_2.pth")["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
