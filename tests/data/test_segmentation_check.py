"""Tests of the check of images and label maps: what passes, what each message says."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mmcastling.data import SegmentationFormatError, check_segmentation


@pytest.fixture
def split(tmp_path):
    """Three images of 12x8 with labels 0 to 2, one of them in a folder of its own."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "town/c"):
        for kind, shape, suffix in (
            ("images", (8, 12, 3), ".jpg"),
            ("labels", (8, 12), ".png"),
        ):
            path = tmp_path / kind / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            high = 255 if kind == "images" else 3
            cv2.imwrite(str(path), rng.integers(0, high, shape, dtype=np.uint8))
    return tmp_path


def check(split, **options):
    options = dict(dict(allowed=(0, 1, 2, 255)), **options)
    return check_segmentation(split / "images", split / "labels", **options)


def fails(split, *parts, **options):
    with pytest.raises(SegmentationFormatError) as caught:
        check(split, **options)
    for part in parts:
        assert part in str(caught.value), caught.value


def test_a_good_split_passes(split):
    check(split)


def test_the_ignored_value_passes(split):
    cv2.imwrite(str(split / "labels/a.png"), np.full((8, 12), 255, np.uint8))
    check(split)
    fails(split, "labels/a.png holds 255 (96 pixels)", allowed=(0, 1, 2))


def test_a_value_outside_the_classes_is_named_with_its_file(split):
    label = np.zeros((8, 12), np.uint8)
    label[0, :5], label[1, 0] = 7, 200
    cv2.imwrite(str(split / "labels/town/c.png"), label)
    fails(
        split,
        "labels has 1 problem",
        "labels/town/c.png holds 7 (5 pixels), 200 (1 pixels); expected",
        "[0, 1, 2, 255]",
    )
    fails(
        split, "expected 0 to 2 for the 3 classes", meaning="0 to 2 for the 3 classes"
    )


def test_values_of_sixteen_bits_are_read(split):
    label = np.zeros((8, 12), np.uint16)
    label[0, 0] = 40_000
    cv2.imwrite(str(split / "labels/a.png"), label)
    fails(split, "labels/a.png holds 40000 (1 pixels)")


def test_indices_of_a_palette_are_the_ids(split):
    label = Image.fromarray(np.full((8, 12), 2, np.uint8))
    label.putpalette([9, 9, 9, 50, 50, 50, 200, 0, 0])
    assert label.mode == "P"
    label.save(split / "labels/a.png")
    check(split)


def test_colours_in_place_of_ids(split):
    cv2.imwrite(str(split / "labels/b.png"), np.zeros((8, 12, 3), np.uint8))
    fails(split, "labels/b.png has channels R+G+B", "Convert its colours to ids")


def test_a_map_of_another_size_than_its_image(split):
    cv2.imwrite(str(split / "labels/b.png"), np.zeros((12, 8), np.uint8))
    fails(split, "labels/b.png is 8x12", "its image b.jpg 12x8", "equal sizes")


def test_an_image_that_a_camera_has_turned_counts_as_it_is_shown(split):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(split / "images/b.jpg") as image:
        image.load()
        image.save(split / "images/b.jpg", exif=exif)
    assert cv2.imread(str(split / "images/b.jpg")).shape == (12, 8, 3)  # as mmcv does
    fails(split, "labels/b.png is 12x8", "its image b.jpg 8x12")
    cv2.imwrite(str(split / "labels/b.png"), np.zeros((12, 8), np.uint8))
    check(split)


@pytest.mark.parametrize(
    ("folder", "what"), [("images", "images"), ("labels", "label maps")]
)
def test_a_missing_split(folder, what, split):
    (split / folder).rename(split / "elsewhere")
    fails(split, f"folder of {what}", f"{folder} does not exist", "'elsewhere'")


def test_missing_files(split):
    (split / "labels/a.png").unlink()
    fails(split, "labels/a.png does not exist", "seg_map_suffix")
    fails(split, "images/d.jpg does not exist", names=["b", "d"])
    check(split, names=["b"])


def test_names_with_another_suffix(split):
    fails(split, "no images whose names end in '.tif'", "'a.jpg'", image_suffix=".tif")


@pytest.mark.parametrize(
    ("file", "what"),
    [("images/a.jpg", "not a readable image"), ("labels/a.png", "label map")],
)
def test_damaged_files(file, what, split):
    (split / file).write_bytes((split / file).read_bytes()[:40])
    fails(split, file, what)


def test_many_problems_are_counted(split):
    names = ["a", "b", *"defghi"]
    fails(split, "has 8 problems", "... and 3 more", allowed=[9], names=names)
