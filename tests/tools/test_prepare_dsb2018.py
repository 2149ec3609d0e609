"""Tests of the converter of the Data Science Bowl's nuclei, and of its split."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepare_dsb2018 import SPLITS, prepare_dsb2018, split_of
from pycocotools import mask as rle

from mmcastling.data import DatasetError

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def write_micrograph(clone, name, picture, masks):
    """A folder of the source."""
    for part in ("images", "masks"):
        (clone / "stage1_train" / name / part).mkdir(parents=True)
    folder = clone / "stage1_train" / name
    picture.save(folder / "images" / f"{name}.png")
    for i, mask in enumerate(masks):
        image = Image.fromarray(np.uint8(255 * mask))
        image.save(folder / "masks" / f"{i:04d}.png")


def load(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


@pytest.fixture
def clone(tmp_path):
    """Twelve micrographs of other sizes with two nuclei and an empty mask each."""
    noise = np.random.default_rng(0)
    for i in range(12):
        shape = (20 + i, 30)
        pixels = noise.integers(0, 255, (*shape, 4), np.uint8)
        masks = [np.zeros(shape, bool) for _ in range(3)]
        masks[0][2:6, 3:9] = True
        masks[2][10:12, i : i + 2] = True
        picture = Image.fromarray(pixels, "RGBA")
        write_micrograph(tmp_path / "clone", f"{i:x}", picture, masks)
    return tmp_path / "clone"


def test_every_fifth_is_tested_and_of_the_rest_every_fifth_validated(clone, tmp_path):
    counts = prepare_dsb2018(clone, tmp_path / "out")
    assert counts == dict(train=(8, 16), val=(1, 2), test=(3, 6))
    numbers = {
        split: [image["id"] - 1 for image in load(tmp_path / "out", split)["images"]]
        for split in SPLITS
    }
    assert numbers["test"] == [0, 5, 10]
    assert numbers["val"] == [6]
    assert sorted(n for found in numbers.values() for n in found) == list(range(12))


def test_pictures_boxes_and_masks_are_those_of_the_source(clone, tmp_path):
    prepare_dsb2018(clone, tmp_path / "out")
    table = load(tmp_path / "out", "train")
    image = next(image for image in table["images"] if image["id"] == 4)
    assert image["file_name"] == "0003.png"
    assert (image["height"], image["width"]) == (23, 30)
    picture = Image.open(tmp_path / "out" / "train" / "0003.png")
    source = Image.open(clone / "stage1_train" / "3" / "images" / "3.png")
    assert np.array_equal(picture, source.convert("RGB"))
    first, second = (a for a in table["annotations"] if a["image_id"] == 4)
    assert first["bbox"] == [3, 2, 6, 4]
    assert first["area"] == 24
    expected = np.zeros((23, 30), bool)
    expected[10:12, 3:5] = True
    assert np.array_equal(rle.decode(second["segmentation"]), expected)


def test_the_split_is_that_of_the_shared_copy(shared_data, tmp_path):
    folder = shared_data / "dsb2018"
    stored = {split: load(folder, split) for split in ("train", "val")}
    for split, table in stored.items():
        assert {split_of(image["id"] - 1) for image in table["images"]} == {split}
    # A clone of the first 25, those for testing blank.
    blank = Image.new("RGB", (8, 8))
    for number in range(25):
        picture, masks = blank, [np.eye(8, dtype=bool)]
        for split, table in stored.items():
            path = folder / split / f"{number:04d}.png"
            if path.is_file():
                picture = Image.open(path)
                masks = [
                    rle.decode(entry["segmentation"])
                    for entry in table["annotations"]
                    if entry["image_id"] == number + 1
                ]
        write_micrograph(tmp_path / "clone", f"{number:04d}", picture, masks)
    prepare_dsb2018(tmp_path / "clone", tmp_path / "out")
    for split, table in stored.items():
        ours = load(tmp_path / "out", split)
        files = [image["file_name"] for image in ours["images"]]
        assert files == [image["file_name"] for image in table["images"]][: len(files)]
        for entry, theirs in zip(
            ours["annotations"], table["annotations"], strict=False
        ):
            assert {**theirs, **entry} == theirs


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda clone, out: clone.rename(clone.parent / "elsewhere"),
            "give a clone of",
        ),
        (lambda clone, out: (out / "a").mkdir(parents=True), "exists already"),
        (
            lambda clone, out: (clone / "stage1_train/3/images/3.png").write_text("?"),
            r"3\.png cannot be read",
        ),
        (
            lambda clone, out: Image.new("L", (5, 5)).save(
                clone / "stage1_train/3/masks/0000.png"
            ),
            r"0000\.png is \(5, 5\), its micrograph \(23, 30\)",
        ),
    ],
    ids=["no clone", "in use", "no picture", "mask of another size"],
)
def test_bad_input_is_named_and_nothing_is_written(clone, tmp_path, spoil, said):
    out = tmp_path / "out"
    spoil(clone, out)
    with pytest.raises(DatasetError, match=said):
        prepare_dsb2018(clone, out)
    assert not (out / "annotations").exists()
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_command_says_what_it_wrote(clone, tmp_path):
    tool = ROOT / "tools" / "data" / "prepare_dsb2018.py"
    command = [sys.executable, str(tool), str(clone), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "train 8 micrographs, 16 nuclei" in done.stdout
