"""Images reach an exported file as they reach torch, or are told what to become."""

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from mmcastling.runtime import ExportedInferencer, ExportedModelError, ExportMetadata
from mmcastling.runtime.images import COLOUR_TYPES, read_image

NOISE = np.random.default_rng(0)
COLOUR = NOISE.integers(0, 256, (6, 9, 3), np.uint8)
GREY = cv2.cvtColor(COLOUR, cv2.COLOR_BGR2GRAY)


def metadata(channels=3, **reading):
    steps = (dict(type="LoadImageFromFile", **reading),) if reading else ()
    return ExportMetadata(
        *("backbone", "X", ()), pipeline=steps, channels=channels, dynamic_batch=False
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image a kind: of 16 bits, grey, with alpha, turned by EXIF."""
    folder = tmp_path_factory.mktemp("images")
    cv2.imwrite(str(folder / "deep.png"), GREY.astype(np.uint16) * 200)
    cv2.imwrite(str(folder / "grey.png"), GREY)
    alpha = NOISE.integers(0, 256, (6, 9, 1), np.uint8)
    cv2.imwrite(str(folder / "alpha.png"), np.concatenate([COLOUR, alpha], axis=2))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(COLOUR).save(folder / "turned.jpg", exif=turned)
    return folder


@pytest.mark.parametrize("color_type", COLOUR_TYPES)
@pytest.mark.parametrize("name", ["deep.png", "grey.png", "alpha.png", "turned.jpg"])
def test_files_and_their_bytes_are_read_as_the_config_reads_them(
    files, name, color_type
):
    reading = dict(color_type=color_type)
    expected = LoadImageFromFile(**reading)(dict(img_path=str(files / name)))["img"]
    for source in (files / name, (files / name).read_bytes()):
        found = read_image(source, metadata(**reading))
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


WITH_ALPHA = np.concatenate([COLOUR, COLOUR[..., :1]], axis=2)


@pytest.mark.parametrize(
    ("given", "expected", "channels"),
    [
        (COLOUR.astype(np.int64), COLOUR, 3),
        (COLOUR.astype(np.float64), COLOUR.astype(np.float32), 3),
        (GREY, np.repeat(GREY[..., None], 3, 2), 3),
        (GREY[..., None], GREY, 1),
        (WITH_ALPHA, COLOUR, 3),
        (COLOUR, GREY, 1),
        (WITH_ALPHA, WITH_ALPHA, 4),
        (Image.fromarray(COLOUR[..., ::-1]), COLOUR, 3),
        (Image.fromarray(WITH_ALPHA[..., [2, 1, 0, 3]]), COLOUR, 3),
        (Image.fromarray(GREY), GREY, 1),
        (Image.fromarray(GREY > 99), (np.stack([GREY > 99] * 3, 2)) * 255, 3),
    ],
)
def test_what_is_clearly_an_image_is_converted(given, expected, channels):
    found = read_image(given, metadata(channels))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype or expected.dtype == np.int64


def test_sixteen_bits_are_kept_where_the_config_keeps_them():
    deep = GREY.astype(np.int32) * 100
    found = read_image(deep, metadata(1, color_type="unchanged"))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, deep)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (GREY > 99, "bool: pass image.astype"),
        (COLOUR.astype(np.int32) * 100, "numbers from 0 to 255, got int32 from"),
        (COLOUR.astype(np.int8), "numbers from 0 to 255, got int8 from -"),
        (COLOUR * np.float32("nan"), "got NaN"),
        (COLOUR.transpose(2, 0, 1), r"for \(C, H, W\) in RGB pass image\[::-1\]"),
        (COLOUR[None], "pass a list of images"),
        (torch.zeros(3, 6, 9), r"got Tensor: .*\.permute\(1, 2, 0\)"),
        (np.array("a"), r"must be an array \(H, W\)"),
        ("https://example.org/a.jpg", "is an address: download it"),
        ("none.jpg", "none.jpg does not exist"),
        (b"no image", "of 8 bytes cannot be read"),
        (7, "got int"),
    ],
)
def test_what_is_not_clearly_an_image_is_told_what_to_pass(given, said):
    with pytest.raises(ExportedModelError, match=said):
        read_image(given)
    if not isinstance(given, str):
        with pytest.raises(ExportedModelError, match="channels does not fit"):
            read_image(WITH_ALPHA, metadata(2))


def test_numbers_from_0_to_1_are_said_to_be_nearly_black(caplog):
    read_image(np.full((4, 4, 3), 0.5, np.float32))
    assert "pass image * 255" in caplog.text
    caplog.clear()
    read_image(np.full((4, 4, 3), 1.5, np.float32))
    read_image(np.zeros((4, 4, 3), np.float32))
    assert not caplog.text


def test_the_inferencer_takes_all_of_them(brightness, files):
    inferencer = ExportedInferencer(brightness, threads=1)
    light = np.full((8, 8), 240, np.int64)
    data = cv2.imencode(".png", light.astype(np.uint8))[1].tobytes()
    for source in (light, Image.fromarray(light.astype(np.uint8)), data):
        predictions = inferencer([source, source])["predictions"]
        assert len(inferencer(source)["predictions"] + predictions) == 3
        assert inferencer.predict(source).label == 1
