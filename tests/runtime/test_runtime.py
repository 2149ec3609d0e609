"""Around an exported graph: images in, boxes, masks and maps out, in numpy."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.transforms import Compose
from mmengine.registry import TRANSFORMS, init_default_scope

from mmcastling.export.agreement import compare, compare_detections, match
from mmcastling.runtime import ExportedModel, ExportedModelError, ExportMetadata
from mmcastling.runtime.postprocess import paste_masks, resize_bilinear, slide
from mmcastling.runtime.preprocess import STEPS, prepare

NOISE = np.random.default_rng(0)


def metadata(**facts):
    return ExportMetadata(**{"kind": "backbone", "name": "X", "outputs": (), **facts})


# -- masks and maps --------------------------------------------------------------------


def test_masks_are_pasted_as_mmdet_pastes_them():
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    corners = NOISE.uniform(-5, (90, 60), (40, 2))
    boxes = np.concatenate([corners, corners + NOISE.uniform(0.5, 60, (40, 2))], 1)
    boxes = np.float32([*boxes, [10, 10, 10, 30], [0, 0, 100, 70]])
    masks = NOISE.random((len(boxes), 28, 28), np.float32)
    pasted = paste_masks(masks, boxes, (70, 100))
    values = np.zeros(pasted.shape, np.float32)
    for index in range(len(boxes)):  # one by one, as mmdet does it on a CPU
        one = slice(index, index + 1)
        part, window = _do_paste_mask(
            torch.from_numpy(masks[one])[:, None], torch.from_numpy(boxes[one]), 70, 100
        )
        values[(index, *window)] = part[0].numpy()
    expected = values >= 0.5
    near = np.abs(values - 0.5) < 1e-5  # decided by rounding
    assert near.mean() < 1e-3
    assert expected.sum() > 1000
    np.testing.assert_array_equal(pasted | near, expected | near)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_a_mask_is_where_its_probability_reaches_the_threshold(threshold):
    ramp = np.linspace(0, 1, 40, dtype=np.float32)[None, None].repeat(40, axis=1)
    pasted = paste_masks(ramp, np.float32([[0, 0, 40, 40]]), (40, 40), threshold)
    np.testing.assert_array_equal(pasted, ramp >= threshold)


def test_no_masks_paste_to_none():
    pasted = paste_masks(np.zeros((0, 28, 28)), np.zeros((0, 4)), (7, 9))
    assert pasted.shape == (0, 7, 9)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(9, 31), (4, 7), (12, 5), (1, 1)])
def test_maps_are_resized_as_torch_resizes_them(size, corners):
    values = NOISE.random((3, 7, 11), np.float32)
    expected = F.interpolate(
        torch.from_numpy(values)[None],
        size=size,
        mode="bilinear",
        align_corners=corners,
    )[0].numpy()
    np.testing.assert_allclose(
        resize_bilinear(values, size, corners), expected, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(20, 50), (16, 16), (40, 17)])
def test_windows_cover_the_image_and_are_averaged(shape):
    image = NOISE.random((1, 3, *shape), np.float32)
    seen = []

    def run(window):
        seen.append(window.shape[2:])
        return window[:, :2]

    out = slide(run, image, dict(crop_size=(16, 16), stride=(10, 10)))
    np.testing.assert_allclose(out, image[:, :2], rtol=1e-6)
    assert set(seen) == {(16, 16)}


# -- images ----------------------------------------------------------------------------

PIPELINES = {
    "mmdet": [dict(type="Resize", scale=(133, 80), keep_ratio=True)],
    "mmdet stretched": [dict(type="Resize", scale=(96, 64), keep_ratio=False)],
    "mmdet padded": [
        dict(type="Resize", scale=(64, 64), keep_ratio=True),
        dict(type="Pad", size=(64, 64), pad_val=dict(img=(114, 114, 114))),
    ],
    "mmpretrain": [
        dict(
            type="ResizeEdge",
            scale=48,
            edge="short",
            backend="pillow",
            interpolation="bicubic",
        ),
        dict(type="CenterCrop", crop_size=32),
    ],
    "mmseg": [dict(type="Resize", scale=(100, 50), keep_ratio=True)],
    **{
        f"mmdet {mode}": [
            dict(type="Pad", size_divisor=32, pad_val=7, padding_mode=mode)
        ]
        for mode in STEPS["Pad"].options["padding_mode"]
    },
}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("shape", [(97, 61), (60, 121)])
def test_images_are_prepared_as_the_pipeline_does(name, shape):
    init_default_scope(name.split()[0])
    image = NOISE.integers(0, 256, (*shape, 3), np.uint8)
    steps = PIPELINES[name]
    pipeline = Compose([TRANSFORMS.build(dict(step)) for step in steps])
    record = dict(
        img=image.copy(), img_shape=shape, ori_shape=shape, height=shape[0], width=1
    )
    expected = pipeline(record)
    prepared = prepare(image, metadata(pipeline=tuple(steps)))
    got = prepared.batch[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(got, expected["img"])
    for channels in () if name == "mmdet padded" else (1, 4):
        pixels = np.concatenate([image, image], axis=2)[..., :channels].squeeze()
        got = prepare(pixels, metadata(pipeline=tuple(steps))).batch[0]
        theirs = pipeline(dict(record, img=pixels.copy()))["img"]
        np.testing.assert_array_equal(got.transpose(1, 2, 0).squeeze(), theirs)
    assert prepared.original == shape
    if "scale_factor" in expected and name != "mmpretrain":
        np.testing.assert_allclose(prepared.scale, expected["scale_factor"])


def test_images_are_normalized_and_padded_as_the_preprocessor_does():
    from mmdet.models.data_preprocessors import DetDataPreprocessor
    from mmdet.structures import DetDataSample

    image = NOISE.integers(0, 256, (45, 70, 3), np.uint8)
    options = dict(mean=[123.675, 116.28, 103.53], std=[58.4, 57.1, 57.4])
    module = DetDataPreprocessor(**options, bgr_to_rgb=True, pad_size_divisor=32)
    sample = DetDataSample(metainfo=dict(img_shape=(45, 70)))
    inputs = [torch.from_numpy(image.transpose(2, 0, 1).copy())]
    batch = module(dict(inputs=inputs, data_samples=[sample]), False)["inputs"]
    facts = {key: tuple(value) for key, value in options.items()}
    prepared = prepare(image, metadata(**facts, to_rgb=True, pad_divisor=32))
    assert prepared.size == (45, 70)
    np.testing.assert_allclose(prepared.batch, batch.numpy(), atol=1e-6)


# -- files -----------------------------------------------------------------------------


def test_metadata_survives_the_file():
    original = metadata(
        kind="detector",
        classes=("a", "b"),
        palette=((1, 2, 3), (4, 5, 6)),
        mean=(1.5, 2.0, 3.0),
        pipeline=(dict(type="Resize", scale=(4, 5), keep_ratio=True),),
        segmentation=dict(mode="slide", crop_size=(3, 4)),
    )
    read = ExportMetadata.from_json(original.to_json(), "x.onnx")
    assert read.to_json() == original.to_json()
    assert read.palette == original.palette


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"kind": "oracle"}', "x"])
def test_files_without_readable_metadata_are_refused(text):
    with pytest.raises(ExportedModelError, match=r"x\.onnx|newer version"):
        ExportMetadata.from_json(text, "x.onnx")


def test_files_that_cannot_be_run_are_refused(tmp_path):
    with pytest.raises(ExportedModelError, match="does not exist"):
        ExportedModel(tmp_path / "none.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    with pytest.raises(ExportedModelError, match=r"cannot load .*6 bytes"):
        ExportedModel(tmp_path / "broken.onnx")
    with pytest.raises(ExportedModelError, match="not known: choose one of"):
        ExportedModel(tmp_path / "broken.onnx", "tensorrt")
    with pytest.raises(ExportedModelError, match=r"does not run \.onnx"):
        ExportedModel(tmp_path / "broken.onnx", "torch")
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ExportedModelError, match="no exported model"):
        ExportedModel(tmp_path / "weights.pth")
    (tmp_path / "model.torchscript").write_bytes(b"")
    with pytest.raises(ExportedModelError, match=r"torch deprecates .* --format onnx"):
        ExportedModel(tmp_path / "model.torchscript")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_missing_runtime_says_what_to_install(tmp_path, monkeypatch, runtime):
    monkeypatch.setitem(__import__("sys").modules, runtime, None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ExportedModelError, match=f"pip install {runtime}"):
        ExportedModel(tmp_path / "model.onnx", runtime)


# -- agreement -------------------------------------------------------------------------

BOXES = np.float32([[0, 0, 10, 10], [20, 20, 60, 60], [0, 0, 10, 10]])
FOUND = dict(
    boxes=BOXES, scores=np.float32([0.9, 0.8, 0.7]), labels=np.array([0, 1, 1])
)


def test_detections_match_by_class_box_and_score():
    moved = dict(FOUND, boxes=BOXES + np.float32(0.01))
    same = partial(match, same_box=0.99, score_tolerance=1e-3)
    assert sorted(same(FOUND, moved)) == [(0, 0), (1, 1), (2, 2)]
    order = [2, 0, 1]
    shuffled = {name: value[order] for name, value in FOUND.items()}
    assert sorted(same(FOUND, shuffled)) == [(0, 1), (1, 2), (2, 0)]
    assert len(same(FOUND, dict(FOUND, labels=np.array([0, 0, 1])))) == 2
    assert len(same(FOUND, dict(FOUND, scores=FOUND["scores"] - 0.1))) == 0
    assert len(same(FOUND, dict(FOUND, boxes=BOXES * np.float32(1.1)))) == 0


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"boxes": BOXES + np.float32(1)}, False),
        ({"labels": np.array([1, 1, 1])}, False),
        ({name: value[:2] for name, value in FOUND.items()}, False),
        ({name: value[:0] for name, value in FOUND.items()}, False),
    ],
    ids=["same", "moved", "renamed", "one missing", "none"],
)
def test_detections_that_differ_are_told(change, holds):
    result = compare_detections(FOUND, {**FOUND, **change}, (64, 64))
    assert result.holds == holds


@pytest.mark.parametrize(
    ("change", "holds"), [(5e-5, True), (3e-4, False), (np.nan, False)]
)
def test_features_that_differ_are_told(change, holds):
    one = {"feature_0": np.ones((1, 2, 3, 3), np.float32)}
    other = {"feature_0": one["feature_0"] + np.float32(change)}
    assert compare(one, other).holds == holds
    assert not compare(one, {"feature_0": np.ones((1, 2))}).holds
