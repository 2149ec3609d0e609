"""Pictures and videos in, painted ones out: what is drawn, said, and refused."""

import io

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from rich.console import Console

from mmcastling.run import ConfigError
from mmcastling.run.demo import find_sources, run_demo
from mmcastling.runtime.images import read_image
from mmcastling.show.painting import Painter

GREY = np.full((120, 160, 3), 128, np.uint8)


def detections(masks=True):
    """A sure box at the left, an unsure one at the right."""
    boxes = torch.tensor([[20.0, 20, 60, 60], [100, 40, 140, 90]])
    instances = InstanceData(
        bboxes=boxes, scores=torch.tensor([0.9, 0.2]), labels=torch.tensor([0, 1])
    )
    if masks:
        instances.masks = torch.zeros(2, 120, 160, dtype=torch.bool)
        instances.masks[0, 30:50, 30:50] = True
        instances.masks[1, 50:80, 110:130] = True
    return BaseDataElement(pred_instances=instances)


class Predictor:
    """Finds the same in every picture; keeps what it was given."""

    name = "a stand-in"

    def __init__(self, scope="mmdet", sample=None, classes=("cat", "dog")):
        self.scope = scope
        self.sample = sample or detections()
        self.dataset_meta = dict(classes=classes, palette=[(255, 0, 0), (0, 0, 255)])
        self.seen = []

    def read(self, path):
        return read_image(path)

    def __call__(self, image):
        self.seen.append(image)
        return self.sample, 0.25 * len(self.seen)


@pytest.fixture
def said():
    return Console(file=io.StringIO(), width=60)


def changed(image):
    return np.abs(image.astype(int) - 128).max(axis=2) > 30


# -- what is painted -------------------------------------------------------------------


def test_boxes_and_masks_are_drawn_where_they_are_and_are_sure_enough():
    paint = Painter("mmdet", Predictor().dataset_meta, score_thr=0.3)
    marks = changed(paint(GREY, detections()))
    assert marks[35:45, 35:45].all()  # the mask
    assert marks[58:62, 25:55].any(axis=0).all()  # the lower edge of the box
    assert not marks[:, 90:].any()
    assert (GREY == 128).all()
    assert paint.shown(detections()) == "1 above 0.3"
    both = Painter("mmdet", Predictor().dataset_meta, score_thr=0.1)
    assert changed(both(GREY, detections()))[55:75, 115:125].all()
    assert both.shown(detections()) == "2 above 0.1"


def test_colours_are_those_of_the_palette_in_bgr():
    paint = Painter("mmdet", Predictor().dataset_meta)
    blue, green, red = paint(GREY, detections())[40, 40].astype(int)
    assert red > green + 40 and red > blue + 40


def test_classes_of_pixels_are_laid_over_the_picture():
    labels = torch.zeros(1, 120, 160, dtype=torch.long)
    labels[:, :, 80:] = 1
    sample = BaseDataElement(pred_sem_seg=PixelData(data=labels))
    paint = Painter("mmseg", Predictor().dataset_meta)
    painted = paint(GREY, sample).astype(int)
    assert painted[110, 5, 2] > painted[110, 5, 0] + 40  # red
    assert painted[110, 155, 0] > painted[110, 155, 2] + 40  # blue
    assert paint.shown(sample) == "2 classes"


def test_unnamed_classes_of_pixels_have_numbers_and_colours_of_their_own():
    labels = torch.zeros(1, 120, 160, dtype=torch.long)
    labels[:, :, 80:] = 17
    sample = BaseDataElement(pred_sem_seg=PixelData(data=labels))
    painted = Painter("mmseg", dict(classes=None, palette=None))(GREY, sample)
    assert (painted[110, 5] != painted[110, 155]).any()


@pytest.mark.parametrize(
    "picture",
    [
        GREY[..., 0],
        GREY[..., 0].astype(np.uint16) * 257,
        np.float32(GREY),
        np.concatenate([GREY, GREY], axis=2)[..., :4],
    ],
    ids=["grey", "16 bits", "float", "alpha"],
)
def test_any_picture_that_a_network_takes_is_painted_as_colour(picture):
    picture = picture.copy()
    picture[:10, :10] = picture.max() * (1.9 if picture.dtype == np.uint16 else 1)
    painted = Painter("mmdet", Predictor().dataset_meta)(picture, detections())
    assert painted.shape == (120, 160, 3)
    level = 134 if picture.dtype == np.uint16 else 128  # the brightest is white
    assert abs(int(painted[100, 150, 0]) - level) < 2


def test_a_label_is_written_legibly_on_a_small_picture():
    sample = BaseDataElement(
        pred_score=torch.tensor([0.2, 0.8]), pred_label=torch.tensor([1])
    )
    paint = Painter("mmpretrain", Predictor().dataset_meta)
    painted = paint(GREY[:28, :28], sample)
    assert painted.shape == (224, 224, 3)
    assert changed(painted).any()
    assert paint.shown(sample) == "dog 0.80"


# -- pictures and videos ---------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "a.png"):
        cv2.imwrite(str(folder / name), GREY)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_each_picture_of_a_folder_is_painted_and_timed(pictures, tmp_path, said):
    predictor = Predictor()
    report = run_demo(pictures, predictor, tmp_path / "out", console=said)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["a.jpg.png", "a.png.png", "b.png"]
    assert [path.name for path in report.written] == ["a.jpg.png", "a.png.png", "b.png"]
    painted = cv2.imread(str(tmp_path / "out" / "b.png"))
    expected = Painter("mmdet", predictor.dataset_meta)(GREY, detections())
    assert (painted == expected).all()
    text = said.file.getvalue()
    assert "a.jpg: 1 above 0.3, 0.2500 s" in text and "b.png: 1 above 0.3" in text
    assert "3/3" in text
    # The first is a warm-up.
    assert report.seconds == [0.25, 0.5, 0.75]
    assert str(report).startswith("3 images, 0.6250 s per image (median")
    assert "the first took 0.2500" in str(report)


def test_pictures_reach_the_model_as_they_are(pictures, tmp_path, said):
    colours = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    path = tmp_path / "one.png"
    cv2.imwrite(str(path), colours)
    predictor = Predictor(
        "mmpretrain",
        BaseDataElement(pred_score=torch.tensor([1.0]), pred_label=torch.tensor([0])),
    )
    report = run_demo(path, predictor, tmp_path / "out", console=said)
    assert (predictor.seen[0] == colours).all()
    assert str(report).startswith("1 image, 0.2500 s per image")


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "moving.avi"
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (160, 120)
    )
    for level in (60, 128, 200):
        writer.write(np.full_like(GREY, level))
    writer.release()
    return path


def test_a_video_becomes_a_video_of_the_same_speed(video, tmp_path, said):
    report = run_demo(video, Predictor(), tmp_path / "out", console=said)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["moving.mp4"]
    assert len(report.seconds) == 3
    capture = cv2.VideoCapture(str(tmp_path / "out" / "moving.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10.0)
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1].astype(int))
    assert len(frames) == 3
    # Far from the boxes the frames are as they were; in the mask they are red.
    levels = [frame[110, 80].mean() for frame in frames]
    assert levels == pytest.approx([60, 128, 200], abs=8)
    assert all(f[40, 40, 2] > f[40, 40, 0] + 30 for f in frames)


def test_a_video_that_was_interrupted_leaves_nothing(video, tmp_path, said):
    class Broken(Predictor):
        def __call__(self, image):
            if self.seen:
                raise KeyboardInterrupt
            return super().__call__(image)

    with pytest.raises(KeyboardInterrupt):
        run_demo(video, Broken(), tmp_path / "out", console=said)
    assert list((tmp_path / "out").iterdir()) == []


# -- what is refused -------------------------------------------------------------------


def test_what_is_neither_picture_nor_video_nor_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jpg does not exist"):
        find_sources(tmp_path / "none.jpg")
    (tmp_path / "list.txt").write_text("a.jpg")
    with pytest.raises(ConfigError, match=r"list\.txt is neither a picture \(\.jpg"):
        find_sources(tmp_path / "list.txt")
    with pytest.raises(ConfigError, match=r"holds no picture: expected files that end"):
        find_sources(tmp_path)


def test_damaged_pictures_are_passed_over_and_named(pictures, tmp_path, said):
    (pictures / "c.jpg").write_bytes(b"not a picture at all")
    (pictures / "b.png").write_bytes((pictures / "a.png").read_bytes()[:20])
    report = run_demo(pictures, Predictor(), tmp_path / "out", console=said)
    assert [path.name for path in report.written] == ["a.jpg.png", "a.png.png"]
    assert len(report.seconds) == 2
    for text, name in zip(report.damaged, ("b.png", "c.jpg"), strict=True):
        assert f"{name} (20 bytes) cannot be read" in text
    for name in ("a.jpg", "a.png"):
        (pictures / name).write_bytes(b"")
    report = run_demo(pictures, Predictor(), tmp_path / "none", console=said)
    assert (str(report), len(report.damaged)) == ("0 images", 4)


def test_a_damaged_picture_alone_is_named_at_once(tmp_path):
    (tmp_path / "c.jpg").write_bytes(b"not a picture at all")
    with pytest.raises(ConfigError, match=r"c\.jpg \(20 bytes\) cannot be read"):
        find_sources(tmp_path / "c.jpg")


def test_a_damaged_video_is_named(tmp_path, said):
    (tmp_path / "bad.mp4").write_bytes(b"0" * 100)
    with pytest.raises(ConfigError, match=r"bad\.mp4 \(100 bytes\) cannot be read"):
        run_demo(tmp_path / "bad.mp4", Predictor(), tmp_path / "out", console=said)
    assert list((tmp_path / "out").iterdir()) == []


def test_pictures_are_not_painted_over(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), GREY)
    with pytest.raises(ConfigError, match=r"a\.png would be painted over"):
        run_demo(tmp_path, Predictor(), tmp_path)
    assert (cv2.imread(str(tmp_path / "a.png")) == 128).all()
