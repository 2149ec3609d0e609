"""The commands as a person runs them: train, resume, test and convert on real data."""

import pickle
import re
import shutil

import pytest
import torch

from mmcastling.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

NO_VALIDATION = ("val_dataloader=None", "val_cfg=None", "val_evaluator=None")


def test_training_writes_checkpoints_config_and_log(trained):
    names = {path.name for path in trained.work_dir.iterdir() if path.is_file()}
    assert names == {
        "iter_2.pth",
        "iter_4.pth",
        "last_checkpoint",
        "tiny_detector.py",
    }
    (log,) = trained.work_dir.glob("*/*.log")
    text = log.read_text()
    assert "mask_weight: 0.2593" in text
    # Validation is of the graph that ships, so its metrics stand in the log.
    assert "coco/bbox_mAP" in text and "coco/segm_mAP" in text


@pytest.mark.parametrize("arguments", [("--resume",), ("--resume", "auto")])
def test_resume_without_a_path_takes_the_latest_checkpoint(
    arguments, trained, run_main, tmp_path
):
    shutil.copy(trained.masks_on, tmp_path / "iter_2.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    options = ("--cfg-options", "train_cfg.max_iters=3", *NO_VALIDATION)
    options += ("default_hooks.checkpoint.interval=3",)
    result = run_main(
        "train.py", trained.config, "--work-dir", tmp_path, *arguments, *options
    )
    assert result.returncode == 0
    assert "iter: 2" in result.stdout  # resumed epoch: 0, iter: 2
    assert load_checkpoint(tmp_path / "iter_3.pth")["meta"]["iter"] == 3


def test_a_checkpoint_is_converted_and_evaluated(
    trained, run_command, printed_difference, tmp_path
):
    out = tmp_path / "deployed.pth"
    command = ("convert.py", trained.config, trained.masks_off, out)
    converted = run_command(*command, fresh=True)
    assert converted.returncode == 0, converted.stderr[-3000:]
    assert "pruned the auxiliary softmax branch of 2 attentions" in converted.stdout
    assert printed_difference(converted.stdout) < 1e-4
    assert f"wrote {out} and {out.with_suffix('.py')}" in converted.stdout

    results = {}
    for name, config, checkpoint in (
        ("trained", trained.config, trained.masks_off),
        ("deployed", out.with_suffix(".py"), out),
    ):
        predictions = tmp_path / f"{name}.pkl"
        tested = run_command(
            "test.py",
            config,
            checkpoint,
            *("--work-dir", tmp_path / name),
            *("--out", predictions),
            *("--show-dir", tmp_path / f"{name}_pictures"),
            *("--cfg-options", "default_hooks.visualization.score_thr=0.9"),
            fresh=name == "deployed",
        )
        assert tested.returncode == 0, tested.stderr[-3000:]
        assert "coco/segm_AR@100" in tested.stdout
        said = {
            "trained": "pruned the auxiliary softmax branch of 2 attentions: the "
            "backbone at 128x128 takes",
            "deployed": "pruned nothing: it was deployed before",
        }[name]
        assert 0 < tested.stdout.find(said) < tested.stdout.find("Evaluating bbox")
        after = tested.stdout[tested.stdout.find("Evaluating bbox") :]
        assert re.search(
            r"\d s per image in fp32, median forward pass: backbone 0\.\d{4}, neck "
            r"0\.\d{4}, heads 0\.\d{4}, post-processing 0\.\d{4}\n",
            after,
        )
        assert "COCO evaluation by " in tested.stdout
        assert len(list((tmp_path / f"{name}_pictures").rglob("*.jpg"))) == 4
        results[name] = [
            item["pred_instances"]["scores"]
            for item in pickle.loads(predictions.read_bytes())
        ]
    assert all(len(scores) > 9 for scores in results["trained"])
    torch.testing.assert_close(results["deployed"], results["trained"])


def test_what_pruning_saves_is_said_in_macs(
    trained, run_main, printed_difference, tmp_path
):
    result = run_main(
        "test.py", trained.config, trained.masks_on, "--work-dir", tmp_path
    )
    assert result.returncode == 0
    (line,) = [
        text for text in result.stdout.splitlines() if text.startswith("pruned the")
    ]
    deployed, training = (
        float(line.partition(before)[2].split()[0]) for before in ("takes ", "GMACs, ")
    )
    # q k^T and P v over 256 tokens of 128 channels, in two layers.
    saved = 2 * 2 * 256 * 256 * 128 / 1e9
    assert printed_difference(result.stdout) > 1e-3
    assert training - deployed == pytest.approx(saved, abs=2e-3)
    percent = float(re.search(r"\(-([\d.]+)%\)", line)[1])
    assert percent == pytest.approx(100 * (1 - deployed / training), abs=0.5)
    assert "warning: the masks of this checkpoint have not decayed" in result.stdout


def test_the_branch_is_kept_on_request(trained, run_main, tmp_path):
    result = run_main(
        *("test.py", trained.config, trained.masks_on, "--no-deploy"),
        *("--work-dir", tmp_path),
    )
    assert result.returncode == 0
    assert "coco/bbox_mAP" in result.stdout and "pruned" not in result.stdout


def test_test_time_augmentation_evaluates_boxes(trained, run_main, tmp_path):
    result = run_main(
        *("test.py", trained.config, trained.masks_off, "--tta"),
        *("--work-dir", tmp_path),
    )
    assert result.returncode == 0
    assert "evaluating bbox without segm" in result.stdout
    assert "coco/bbox_mAP" in result.stdout and "coco/segm_mAP" not in result.stdout


def test_a_classifier_goes_through_all_commands(
    classifier_config, run_main, printed_difference, tmp_path
):
    work_dir, out = tmp_path / "work", tmp_path / "out.pth"
    trained = run_main(
        *("train.py", classifier_config, "--work-dir", work_dir, "--auto-scale-lr"),
        *("--cfg-options", "auto_scale_lr.base_batch_size=4"),
    )
    assert trained.returncode == 0
    assert "lr: 1.0000e-03" in trained.stdout
    checkpoint = work_dir / "epoch_2.pth"
    converted = run_main("convert.py", classifier_config, checkpoint, out, "--ema")
    assert converted.returncode == 0
    assert printed_difference(converted.stdout) < 1e-4
    for config, path, extra in (
        (classifier_config, checkpoint, ()),
        (out.with_suffix(".py"), out, ()),
        (classifier_config, checkpoint, ("--tta",)),
    ):
        result = run_main("test.py", config, path, "--work-dir", work_dir, *extra)
        assert result.returncode == 0
        assert "accuracy/top1" in result.stdout


def test_no_verification_says_so(trained, run_main, tmp_path):
    result = run_main(
        *("convert.py", trained.config, trained.masks_off, tmp_path / "out.pth"),
        "--no-verify",
    )
    assert result.returncode == 0
    assert "not verified on images" in result.stdout
    assert load_checkpoint(tmp_path / "out.pth")["meta"]["max_abs_diff"] is None


def test_real_coco_data_stands_in_by_data_root(
    root, tiny_coco, run_main, tmp_path, monkeypatch
):
    # The detector of the COCO config, made small enough to build and run in seconds.
    config = tmp_path / "small.py"
    base = str(root / "configs" / "mask_rcnn_castling_s_coco.py")
    config.write_text(
        f"""
_base_ = [{base!r}]
size = (128, 128)
model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(type="BatchFixedSizePad", size=size, pad_mask=True)]
    ),
    backbone=dict(arch="nano", img_size=128),
    neck=dict(in_channels=128),
    rpn_head=dict(num_convs=1),
    roi_head=dict(bbox_head=dict(fc_out_channels=64)),
    train_cfg=dict(
        rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=16))
    ),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=size, keep_ratio=False),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(pipeline=pipeline)
)
val_dataloader = test_dataloader = None
val_cfg = test_cfg = None
val_evaluator = test_evaluator = None
train_cfg = dict(max_iters=1)
default_hooks = dict(checkpoint=dict(interval=1, save_optimizer=False))
"""
    )
    monkeypatch.setenv("MMCASTLING_DATA", str(tmp_path))
    (tmp_path / "coco").symlink_to(tiny_coco)
    result = run_main("train.py", config, "--work-dir", tmp_path / "work")
    assert result.returncode == 0
    meta = load_checkpoint(tmp_path / "work" / "iter_1.pth")["meta"]
    assert len(meta["dataset_meta"]["classes"]) == 80


def test_an_exported_file_is_evaluated_in_its_runtime(
    brightness, classifier_config, run_main, tmp_path
):
    command = ("test.py", classifier_config, brightness, "--work-dir", tmp_path)
    for options in ((), ("--runtime", "onnxruntime")):
        result = run_main(*command, *options)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "accuracy/top1: 100.0" in result.stdout
        assert "pruned nothing: an exported file holds the pruned graph" in (
            result.stdout
        )
        assert re.search(r"\d s per image in onnxruntime, median", result.stdout)
