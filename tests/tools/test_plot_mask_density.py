"""tools/analysis/plot_mask_density.py: on runs of all toolboxes; what it refuses."""

import json

import cv2
import pytest

TOOL = "analysis/plot_mask_density.py"


def log(work_dir, *records):
    folder = work_dir / "20260101_000000" / "vis_data"
    folder.mkdir(parents=True)
    text = "\n".join(json.dumps(record) for record in records)
    (folder / "scalars.json").write_text(text)


MASKS = dict(mask_density=0.25, mask_threshold=0.02, mask_weight=1.0, loss=1.0)


def test_the_picture_goes_into_the_work_directory(run_main, tmp_path):
    records = [dict(MASKS, iter=step, step=step) for step in (10, 20)]
    log(tmp_path, *records, {"step": 20, "mIoU": 31.5, "aAcc": 70.0})
    done = run_main(TOOL, tmp_path)
    assert done.returncode in (0, None), done.stderr
    assert "iterations 10 to 20: density 0.25 -> 0.25" in done.stdout
    assert "mIoU 31.5 at iteration 20" in done.stdout
    assert cv2.imread(str(tmp_path / "mask_density.png")).std() > 10
    out = tmp_path / "own.png"
    done = run_main(TOOL, tmp_path, "--metric", "aAcc", "mIoU", "--out", out)
    assert "aAcc 70 at iteration 20" in done.stdout and out.is_file()


@pytest.mark.slow
def test_detectors_and_classifiers_as_they_were_trained(
    trained, trained_classifier, run_main, tmp_path
):
    out = tmp_path / "density.png"
    done = run_main(TOOL, trained.work_dir, "--out", out)
    assert "4 records of masks, iterations 1 to 4" in done.stdout, done.stderr
    assert "-> 0\n" in done.stdout and out.is_file()
    done = run_main(TOOL, trained_classifier.work_dir, "--out", out)
    assert "iterations 2 to 4" in done.stdout, done.stderr
    assert "accuracy/top1" in done.stdout and "at iteration 4" in done.stdout


@pytest.mark.parametrize(
    ("record", "options", "parts"),
    [
        (None, [], ["holds no log of a training run"]),
        (dict(loss=1.0, iter=1, step=1), [], ["without MaskDecayHook", "custom_hooks"]),
        (dict(MASKS, iter=1, step=1), ["--metric", "mIoU"], ["'mIoU' is not in the"]),
        (dict(MASKS, iter=1, step=1), ["--out", "none/a.png"], ["does not exist"]),
        (dict(MASKS, iter=1, step=1), ["--out", "a.svg"], ["end the name in .png"]),
    ],
    ids=["empty folder", "without the hook", "metric", "missing folder", "svg"],
)
def test_bad_input_is_one_paragraph_and_nothing_is_written(
    record, options, parts, run_main, tmp_path
):
    if record is not None:
        log(tmp_path, record)
    before = sorted(tmp_path.rglob("*"))
    done = run_main(TOOL, tmp_path, *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "error: " in line]
    for part in parts:
        assert part in message
    assert sorted(tmp_path.rglob("*")) == before
