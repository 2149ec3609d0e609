"""The demo as a person runs it, on real pictures."""

import re

import cv2
import numpy as np
import pytest

pytestmark = pytest.mark.slow


def test_pictures_are_painted_and_timed(trained, people, run_command, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures = sorted((people / "val").iterdir())[:2]
    for picture in pictures:
        (folder / picture.name).symlink_to(picture)
    out = tmp_path / "painted"
    # An untrained detector is sure of nothing; with 0 it still draws its boxes.
    result = run_command(
        *("demo.py", folder, trained.config, trained.masks_off),
        *("--out-dir", out, "--score-thr", 0, "--device", "cpu"),
        fresh=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "predicting by torch in fp32 on cpu, pruned" in result.stdout
    assert re.search(r"2 images, \d+\.\d{4} s per image \(median", result.stdout)
    for picture in pictures:
        assert re.search(rf"{picture.name}: \d+ above 0, \d\.\d+ s", result.stdout)
        before = cv2.imread(str(picture)).astype(int)
        after = cv2.imread(str(out / f"{picture.stem}.png")).astype(int)
        assert after.shape == before.shape
        different = np.abs(after - before).max(axis=2) > 10
        assert 0.01 < different.mean() < 1


def test_what_cannot_be_done_is_said_in_a_line(trained, run_main, tmp_path):
    picture = tmp_path / "a.png"
    cv2.imwrite(str(picture), np.zeros((8, 8, 3), np.uint8))
    for arguments, message in (
        ((tmp_path / "x.png", trained.config), "x.png does not exist"),
        ((picture, trained.config), "needs a checkpoint after it"),
        ((picture, tmp_path / "no.onnx"), "no.onnx does not exist"),
        (
            (picture, trained.config, trained.masks_off, "--score-thr", 30),
            "--score-thr 30.0 must lie between 0 and 1",
        ),
    ):
        result = run_main("demo.py", *arguments, "--out-dir", tmp_path / "out")
        assert result.returncode == 1
        (line,) = [x for x in result.stderr.splitlines() if "error: " in x]
        assert message in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_picture_among_others_is_named_in_the_end(
    brightness, run_main, tmp_path
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        cv2.imwrite(str(folder / name), np.zeros((8, 8, 3), np.uint8))
    (folder / "b.png").write_bytes(b"no picture")
    result = run_main("demo.py", folder, brightness, "--out-dir", tmp_path / "out")
    assert result.returncode == 1
    assert "2 images" in result.stdout
    (line,) = [text for text in result.stderr.splitlines() if "error: " in text]
    assert "b.png (10 bytes) cannot be read" in line
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.png", "c.png"}
