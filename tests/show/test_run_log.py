"""Reading what a run logged, and drawing it: one part, resumed parts, damaged files."""

import json

import cv2
import pytest

from mmcastling.checkpoint import CheckpointError
from mmcastling.show.figures import plot_mask_density
from mmcastling.show.run_log import read_mask_history


def train(step, density=0.5, **extra):
    masks = dict(mask_density=density, mask_threshold=0.1, mask_weight=1.0)
    return dict(loss=1.0, lr=0.1, iter=step, step=step) | masks | extra


def val(step, **metrics):
    return dict(step=step, time=0.1, data_time=0.1) | metrics


def write(work_dir, *records, stamp="20260101_000000", config=None):
    folder = work_dir / stamp / "vis_data"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "scalars.json").write_text(lines)
    if config is not None:
        (folder / "config.py").write_text(config)
    return folder / "scalars.json"


def test_columns_are_those_of_the_records(tmp_path):
    groups = dict(mask_density_early=0.6, mask_density_middle=0.4)
    write(
        tmp_path,
        train(10, 0.5, **groups, mask_threshold_uniform=4.0),
        train(20, 0.25, **groups, mask_threshold_uniform=2.0),
    )
    history = read_mask_history(tmp_path)
    assert (history.steps, history.density) == ([10, 20], [0.5, 0.25])
    assert (history.threshold, history.weight) == ([0.1, 0.1], [1.0, 1.0])
    assert history.threshold_uniform == [4.0, 2.0]
    assert history.groups == {"early": [0.6, 0.6], "middle": [0.4, 0.4]}
    assert (history.metrics, history.headlines()) == ({}, [])
    assert read_mask_history(tmp_path / "20260101_000000") == history


def test_validations_by_iteration_keep_theirs_and_those_by_epoch_get_one(tmp_path):
    epoch = [train(50), train(100), val(1, mIoU=1.0), train(150), val(2, mIoU=2.0)]
    write(tmp_path / "epochs", *epoch)
    write(tmp_path / "iterations", train(50), val(60, mIoU=1.0), train(100))
    metrics = read_mask_history(tmp_path / "epochs").metrics
    assert metrics == {"mIoU": [(100, 1.0), (150, 2.0)]}
    assert read_mask_history(tmp_path / "iterations").metrics == {"mIoU": [(60, 1.0)]}


def test_a_resumed_run_is_one_without_what_was_lost(tmp_path):
    records = [train(10), train(20), val(20, mIoU=2.0), train(30, 0.9)]
    write(tmp_path, *records, val(30, mIoU=3.0))
    records = [train(30, 0.3), val(1, mIoU=3.5), train(40, 0.2)]
    write(tmp_path, *records, stamp="20260102_000000", config="resume = True\n")
    write(tmp_path, stamp="20260103_000000")  # started, ended before its first record
    history = read_mask_history(tmp_path)
    assert history.steps == [10, 20, 30, 40]
    assert history.density == [0.5, 0.5, 0.3, 0.2]
    assert history.metrics == {"mIoU": [(20, 2.0), (30, 3.5)]}


def test_a_validation_right_after_resuming_belongs_where_training_stood(tmp_path):
    write(tmp_path, train(50), train(90))
    write(tmp_path, val(1, mIoU=1.0), train(150), stamp="20260102_000000")
    assert read_mask_history(tmp_path).metrics == {"mIoU": [(90, 1.0)]}


def test_a_new_start_in_the_same_folder_is_not_joined_to_the_old(tmp_path):
    write(tmp_path, train(5), train(10))
    write(tmp_path, train(10, 0.1), stamp="20260102_000000", config="resume = False\n")
    history = read_mask_history(tmp_path)
    assert (history.steps, history.density) == ([10], [0.1])


def test_logs_with_the_phase_in_their_names(tmp_path):
    record = {f"train/{name}": value for name, value in train(10).items()}
    record |= dict(iter=10, step=10)
    write(tmp_path, record, {"val/coco/bbox_mAP": 0.3, "step": 10, "val/time": 0.1})
    history = read_mask_history(tmp_path)
    assert history.density == [0.5]
    assert history.metrics == {"coco/bbox_mAP": [(10, 0.3)]}


def test_half_a_last_line_is_a_killed_run_and_any_other_is_damage(tmp_path):
    file = write(tmp_path, train(10), train(20))
    file.write_text(file.read_text()[:-20])
    assert read_mask_history(tmp_path).steps == [10]
    file.write_text("not json\n" + file.read_text())
    with pytest.raises(ValueError, match=r"scalars\.json, line 1 .* 'not json'"):
        read_mask_history(tmp_path)


def test_headlines_are_the_usual_metrics_or_the_first(tmp_path):
    write(tmp_path / "coco", train(1), val(1, **{"coco/segm_mAP": 0.1, "x": 1.0}))
    write(tmp_path / "own", train(1), val(1, dice=0.5, precision=0.6))
    assert read_mask_history(tmp_path / "coco").headlines() == ["coco/segm_mAP"]
    history = read_mask_history(tmp_path / "own")
    assert history.headlines() == ["dice"]
    with pytest.raises(ValueError, match=r"'recall' is not .* dice, precision"):
        plot_mask_density(history, tmp_path / "a.png", ["recall"])
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, r"holds no log of a training run .*--work-dir"),
        ([dict(loss=1.0, iter=1, step=1)], r"trained without MaskDecayHook"),
        ([], r"ended before its first record"),
    ],
)
def test_what_is_no_run_with_the_hook_says_so(records, message, tmp_path):
    if records is not None:
        write(tmp_path, *records)
    with pytest.raises(ValueError, match=message):
        read_mask_history(tmp_path)


def test_a_missing_work_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none does not exist: check the path"):
        read_mask_history(tmp_path / "none")


@pytest.mark.parametrize("validated", [True, False])
def test_picture_has_a_panel_for_the_metric_only_where_there_is_one(
    validated, tmp_path
):
    records = [train(10, 0.5), train(20, 0.0)]
    write(tmp_path, *records, *([val(20, mIoU=0.4)] if validated else []))
    path = tmp_path / "density.png"
    plot_mask_density(read_mask_history(tmp_path), path)
    height = cv2.imread(str(path)).shape[0]
    assert height == pytest.approx(130 * (1 + 0.85 * (7 if validated else 5)), abs=2)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    write(tmp_path, train(10))
    history = read_mask_history(tmp_path)
    with pytest.raises(CheckpointError, match=r"folder .* does not exist"):
        plot_mask_density(history, tmp_path / "none" / "density.png")
    assert not (tmp_path / "none").exists()
