"""Configs that castle backbones of others: trained, tested, converted, exported."""

import json
import pickle
import re

import pytest
import torch
from mmpretrain.models.selfsup import MAEViT
from torch.testing import assert_close

from mmcastling.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.long]

LOADERS = """
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    dataset=dict(pipeline=train_pipeline), batch_size=2, **loader
)
test_dataloader = dict(dataset=dict(pipeline=test_pipeline, indices=3), **loader)
val_dataloader = val_cfg = val_evaluator = None
param_scheduler = []
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=-1),
    logger=dict(interval=1),
)
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=3, val_interval=9)
log_processor = dict(by_epoch=False)
"""
DETECTOR = """
_base_ = [{base!r}]
size = (160, 192)
meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
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
    dict(type="PackDetInputs", meta_keys=meta),
]
few = dict(nms_pre=100, max_per_img=50)
model = dict(
    roi_head=dict(bbox_head=dict(fc_out_channels=64), mask_head=dict(num_convs=1)),
    train_cfg=dict(rpn_proposal=few),
    test_cfg=dict(rpn=few, rcnn=dict(score_thr=0.0, max_per_img=10)),
)
"""
SWIN = """
model['backbone'] = dict(
    backbone=dict(
        embed_dims=24,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 3, 6],
        convert_weights=False,
        init_cfg=None,
    )
)
model['neck'] = dict(in_channels=[24, 48, 96, 192])
"""
TIMM = """
model['backbone'] = dict(
    backbone=dict(
        pretrained=False, img_size=160, embed_dim=48, depth=3, out_indices=[2]
    )
)
model['neck'] = dict(in_channels=48)
model['data_preprocessor'] = dict(batch_augments=None)
"""
SEGMENTOR = """
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
arch = dict(embed_dims=48, num_layers=3, num_heads=6, feedforward_channels=96)
arch.update(_delete_=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        backbone=dict(
            arch=arch, img_size=crop_size, init_cfg=dict(checkpoint={weights!r})
        ),
        keep=[-1],
    ),
    neck=dict(in_channels=48),
    decode_head=dict(channels=32, norm_cfg=dict(type="BN")),
    auxiliary_head=None,
    test_cfg=dict(crop_size=crop_size, stride=(43, 64)),
)
"""


@pytest.fixture
def small_config(root, tiny_coco, make_scenes, tmp_path):
    """Write the small version of a config; it and the options it needs."""

    def write(name):
        base = str(root / "configs" / f"{name}.py")
        if "ade20k" in name:
            folder = tmp_path / "ade"
            make_scenes(folder, frames=3, splits=("training", "validation"))
            text = SEGMENTOR.format(base=base, weights=str(mae_weights(tmp_path)))
        else:
            folder = tiny_coco
            text = DETECTOR.format(base=base) + (SWIN if "swin" in name else TIMM)
        path = tmp_path / f"small_{name}.py"
        path.write_text(text + LOADERS)
        return path, ("--cfg-options", f"data_root={folder}/")

    return write


def mae_weights(folder):
    """A small MAE of mmpretrain, for images of another size, as a checkpoint of it."""
    torch.manual_seed(0)
    arch = dict(
        _delete_=True, embed_dims=48, num_layers=3, num_heads=6, feedforward_channels=96
    )
    encoder = MAEViT(arch, img_size=32)
    weights = {f"backbone.{name}": w for name, w in encoder.state_dict().items()}
    weights["neck.mask_token"] = torch.zeros(1)
    torch.save({"state_dict": weights}, folder / "mae.pth")
    return folder / "mae.pth"


@pytest.mark.parametrize(
    ("name", "castled"),
    [
        ("mask_rcnn_castling_swin_t_coco", 5),
        ("mask_rcnn_castling_timm_s_coco", 3),
        ("upernet_castling_mae_b_ade20k", 2),
    ],
)
def test_a_castled_backbone_goes_all_the_way(
    name, castled, small_config, run_main, printed_difference, tmp_path
):
    config, options = small_config(name)

    def run(tool, *arguments):
        done = run_main(tool, *arguments, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("train.py", config, "--work-dir", tmp_path / "work")
    (log,) = (tmp_path / "work").glob("*/vis_data/scalars.json")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["iter"] for r in records] == [1, 2, 3]
    assert all(0 < r["loss"] < 20 for r in records)
    checkpoint = tmp_path / "work" / "iter_3.pth"  # the masks are off
    weights = load_checkpoint(checkpoint)["state_dict"]
    assert sum(n.endswith("local_conv.weight") for n in weights) == castled
    if "mae" in name:  # three steps of warm-up, of at most 1e-4 each, lie between
        held = load_checkpoint(tmp_path / "mae.pth")["state_dict"]
        for part in ("0.attn.qkv.weight", "2.attn.qkv.weight", "1.ffn.layers.1.bias"):
            key = f"backbone.layers.{part}"
            assert_close(weights[key], held[key], atol=4e-4, rtol=0)

    out = tmp_path / "deployed.pth"
    said = run("convert.py", config, checkpoint, out)
    assert f"pruned the auxiliary softmax branch of {castled} attentions" in said
    found = {}
    for which, of, path in (
        ("trained", config, checkpoint),
        ("deployed", out.with_suffix(".py"), out),
    ):
        pickled = tmp_path / f"{which}.pkl"
        tested = run(
            *("test.py", of, path, "--work-dir", tmp_path / which, "--out", pickled)
        )
        assert ("it was deployed before" in tested) == (which == "deployed")
        assert re.search(r"mIoU" if "ade20k" in name else r"coco/segm_mAP", tested)
        found[which] = [
            item["seg_logits"]["data"]
            if "ade20k" in name
            else item["pred_instances"]["scores"]
            for item in pickle.loads(pickled.read_bytes())
        ]
    assert len(found["trained"]) == 3 and found["trained"][0].numel() > 5
    assert_close(found["deployed"], found["trained"], rtol=1e-3, atol=1e-4)

    if "swin" in name:
        resumed = ("--resume", tmp_path / "work" / "iter_2.pth")
        run("train.py", config, "--work-dir", tmp_path / "again", *resumed)
        again = load_checkpoint(tmp_path / "again" / "iter_3.pth")["state_dict"]
        assert_close(again, weights)
    elif "mae" in name:
        counted = run("analysis/get_flops.py", config, "--shape", 64, 96)
        assert "softmax twin" in counted and "the softmax branch saves" in counted
