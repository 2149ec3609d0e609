"""Predictors, beside the toolboxes' own inferencers, and what they refuse."""

import json
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch.testing import assert_close

import mmcastling
from mmcastling.analysis import PartTimer
from mmcastling.checkpoint import CheckpointError
from mmcastling.run import ConfigError, load_config
from mmcastling.run.demo import build_predictor
from mmcastling.runtime import ExportedModelError
from mmcastling.verbs import castling_modules

pytestmark = pytest.mark.slow

SEGMENTOR = """
default_scope = "mmseg"
custom_imports = dict(imports=["mmcastling"])
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[120, 120, 120],
        std=[60, 60, 60],
        bgr_to_rgb=True,
        size_divisor=16,
    ),
    backbone=dict(
        type="mmcastling.CastlingViT",
        arch="nano",
        img_size=64,
        out_type="featmap",
        with_cls_token=False,
    ),
    decode_head=dict(
        type="FCNHead", in_channels=128, in_index=0, channels=8, num_classes=3,
        num_convs=1, concat_input=False, align_corners=False,
    ),
    test_cfg=dict(mode="whole"),
)
visualizer = dict(type="SegLocalVisualizer")
test_dataloader = dict(
    dataset=dict(
        type="BaseSegDataset",
        metainfo=dict(
            classes=("road", "sky", "tree"),
            palette=[[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        ),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(96, 64), keep_ratio=True),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    )
)
"""


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """A config of a segmentor, and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("segmentor")
    config, checkpoint = folder / "segmentor.py", folder / "segmentor.pth"
    config.write_text(SEGMENTOR)
    cfg = load_config(config)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    mmcastling.set_mask(model, 1.0)
    meta = dict(dataset_meta=dict(cfg.test_dataloader.dataset.metainfo))
    meta["mask_decay"] = dict(threshold=1.0, weight=1.0)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return str(config), str(checkpoint)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture that is not square, as a file and as pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 110, 3), np.uint8)
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    cv2.imwrite(str(path), pixels)
    return str(path), pixels


# -- beside the toolboxes' inferencers -------------------------------------------------


def test_detections_are_those_of_mmdets_inferencer(trained, people, picture):
    from mmdet.apis import DetInferencer

    image = next((people / "val").iterdir())
    model = [str(trained.config), str(trained.masks_off)]
    predictor = build_predictor(model)
    assert not list(castling_modules(predictor.model))
    assert predictor.scope == "mmdet"
    assert predictor.dataset_meta["classes"] == ("person",)
    sample, seconds = predictor(cv2.imread(str(image)))
    assert seconds > 0
    theirs = DetInferencer(*model, show_progress=False)
    mmcastling.set_mask(theirs.model, 1.0)
    (expected,) = theirs(str(image), no_save_vis=True, return_datasamples=True)[
        "predictions"
    ]
    assert len(sample.pred_instances) > 9
    for key in ("bboxes", "scores", "labels", "masks"):
        found = getattr(sample.pred_instances, key)
        # A side near the border is a small difference of hundreds of pixels.
        limits = dict(rtol=1e-5, atol=1e-3) if key == "bboxes" else {}
        assert_close(found, getattr(expected.pred_instances, key), **limits)


def test_scores_are_those_of_mmpretrains_inferencer(trained_classifier, picture):
    from mmpretrain import ImageClassificationInferencer

    path, pixels = picture
    model = [str(trained_classifier.config), str(trained_classifier.masks_off)]
    predictor = build_predictor(model)
    sample, _ = predictor(pixels)
    theirs = ImageClassificationInferencer(model[0], pretrained=model[1])
    mmcastling.set_mask(theirs.model, 1.0)
    (expected,) = theirs(path)
    assert_close(sample.pred_score.numpy(), expected["pred_scores"])
    label = int(sample.pred_label)
    assert predictor.dataset_meta["classes"][label] == expected["pred_class"]


def test_classes_of_pixels_are_those_of_mmsegs_inferencer(segmentor, picture):
    from mmseg.apis import MMSegInferencer

    path, pixels = picture
    predictor = build_predictor(list(segmentor))
    assert predictor.dataset_meta == dict(
        classes=("road", "sky", "tree"),
        palette=((255, 0, 0), (0, 255, 0), (0, 0, 255)),
    )
    with PartTimer(predictor.model) as timer:
        sample, _ = predictor(pixels)
    theirs = MMSegInferencer(*segmentor, show_progress=False)
    mmcastling.set_mask(theirs.model, 1.0)
    expected = theirs(path)["predictions"]
    assert sample.pred_sem_seg.data.shape == (1, 70, 110)
    assert (sample.pred_sem_seg.data[0].numpy() == expected).mean() > 0.999
    assert len(np.unique(expected)) > 1
    # A segmentor's parts are timed, too.
    assert timer.parts["neck"] == 0
    assert all(timer.parts[p] > 0 for p in ("backbone", "heads", "post-processing"))


# -- exported files --------------------------------------------------------------------


@pytest.mark.parametrize(("level", "label"), [(50, 0), (200, 1)])
def test_an_exported_file_predicts_alone(brightness, level, label):
    predictor = build_predictor([str(brightness)])
    assert predictor.scope == "mmpretrain"
    assert predictor.dataset_meta["classes"] == ("dark", "light")
    assert predictor.name == "onnxruntime in fp32"
    sample, seconds = predictor(np.full((30, 40, 3), level, np.uint8))
    assert int(sample.pred_label) == label
    assert float(sample.pred_score[label]) > 0.99
    assert seconds > 0


def test_a_backbone_alone_predicts_nothing(brightness, tmp_path):
    import onnx

    model = onnx.load(brightness)
    metadata = json.loads(model.metadata_props[0].value)
    metadata["kind"] = "backbone"
    model.metadata_props[0].value = json.dumps(metadata)
    onnx.save(model, tmp_path / "backbone.onnx")
    with pytest.raises(ConfigError, match="holds a backbone, which predicts nothing"):
        build_predictor([str(tmp_path / "backbone.onnx")])


def test_a_missing_runtime_says_what_to_install(brightness, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportedModelError, match="pip install openvino"):
        build_predictor([str(brightness)], runtime="openvino")


# -- what is refused -------------------------------------------------------------------


def test_a_model_that_is_not_complete(tmp_path, trained):
    config, checkpoint = str(trained.config), str(trained.masks_off)
    for model, message in (
        ([config], "config .* needs a checkpoint after it"),
        ([checkpoint], r"needs its config in front of it"),
        ([config, checkpoint, "x"], "expected CONFIG CHECKPOINT, or one exported file"),
        ([config, "a.onnx"], "expected CONFIG CHECKPOINT, or one exported file"),
        (["mask_rcnn_castlin_s_coco", checkpoint], "did you mean mask_rcnn_castling"),
        ([str(tmp_path / "none.py"), checkpoint], r"none\.py does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            build_predictor(model)
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        build_predictor([config, str(tmp_path / "none.pth")])


def test_options_that_do_not_go_with_the_file(trained, brightness):
    model = [str(trained.config), str(trained.masks_off)]
    with pytest.raises(ConfigError, match="--runtime onnxruntime runs exported files"):
        build_predictor(model, runtime="onnxruntime")
    with pytest.raises(ConfigError, match="--device cuda: exported files run on the"):
        build_predictor([str(brightness)], device="cuda")
    with pytest.raises(ConfigError, match="--device abc cannot be used here"):
        build_predictor(model, device="abc")


def test_a_config_is_found_by_its_name(trained_classifier):
    # Of another size than the checkpoint: found, and then refused for that.
    with pytest.raises(CheckpointError, match="of another architecture"):
        build_predictor(["castling_tiny_in1k", str(trained_classifier.masks_off)])
