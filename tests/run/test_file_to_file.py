"""An exported file against the config's own pipeline, from the picture's file on."""

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS
from PIL import Image
from torch import nn

from mmcastling.export import UnsupportedModelError
from mmcastling.run import exporting as module
from mmcastling.run import load_config
from mmcastling.run.load import build_model
from mmcastling.runtime import ExportedInferencer


@MODELS.register_module()
class Contrast(nn.Module):
    """A backbone that sees all of its input, padding too: values without their mean."""

    def forward(self, x):
        return (x - x.mean(dim=(2, 3), keepdim=True),)


CONFIG = """
default_scope = "mmseg"
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[120.0] * 3,
                           std=[60.0] * 3, bgr_to_rgb=True),
    backbone=dict(type="Contrast"),
    decode_head=dict(
        type="FCNHead", in_channels=3, in_index=0, channels=3, num_classes=3,
        num_convs=0, concat_input=False, align_corners=False,
    ),
    test_cfg=dict(mode="whole"),
)
test_dataloader = dict(dataset=dict(
    type="BaseSegDataset",
    metainfo=dict(classes=("a", "b", "c"), palette=[[0, 0, 0]] * 3),
    pipeline=[
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(48, 40), keep_ratio=True),
        dict(type="LoadAnnotations"),
        dict(type="PackSegInputs"),
    ],
))
"""


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    """Its config, its weights, and its graph, for all pipelines."""
    folder = tmp_path_factory.mktemp("segmentor")
    (folder / "config.py").write_text(CONFIG)
    torch.manual_seed(0)
    model = build_model(load_config(folder / "config.py"))
    nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / "weights.pth")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    layer = model.decode_head.conv_seg
    values = dict(weight=layer.weight, bias=layer.bias)
    values = {name: value.detach().numpy() for name, value in values.items()}
    values["axes"] = np.array([2, 3])
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"]),
        helper.make_node("Sub", ["images", "mean"], ["contrast"]),
        helper.make_node("Conv", ["contrast", "weight", "bias"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, kind, ["n", 3, "h", "w"])
        for name in ("images", "logits")
    ]
    values = [onnx.numpy_helper.from_array(v, name) for name, v in values.items()]
    graph = helper.make_graph(nodes, "contrast", ends[:1], ends[1:], values)
    opset = [helper.make_opsetid("", 18)]
    file = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(file, folder / "graph.onnx")
    return folder


@pytest.fixture
def run_export(segmentor, tmp_path, monkeypatch):
    """Export with options of the config, around the graph that is there."""

    def write(graph, path, metadata, *_):
        model = onnx.load(segmentor / "graph.onnx")
        onnx.helper.set_model_props(model, {"mmcastling": metadata.to_json()})
        onnx.save(model, path)

    def run(picture, options):
        monkeypatch.setattr(module, "write_graph", write)
        cfg = load_config(segmentor / "config.py", options)
        out = tmp_path / "x.onnx"
        module.export(cfg, segmentor / "weights.pth", out, image=picture)
        return cfg, ExportedInferencer(out, threads=1)

    return run


def picture_of(kind, folder):
    path = folder / f"{kind}.png"
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3))
    coarse = cv2.resize(noise.astype(np.float32), (44, 30))
    if kind == "deep":
        cv2.imwrite(str(path), (coarse * 257).astype(np.uint16))
    elif kind == "turned":
        path, exif = path.with_suffix(".jpg"), Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(coarse.astype(np.uint8)).save(path, exif=exif)
    else:
        cv2.imwrite(str(path), coarse)
    return path


PIPELINE = "test_dataloader.dataset.pipeline"
EDGE = [
    dict(type="LoadImageFromFile"),
    dict(type="Pad", size=(48, 56), padding_mode="edge"),
    dict(type="PackSegInputs"),
]
PREPROCESSOR = "model.data_preprocessor"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("plain", {}),
        ("deep", {f"{PIPELINE}.0.color_type": "unchanged"}),
        ("turned", {f"{PIPELINE}.0.color_type": "color_ignore_orientation"}),
        ("plain", {f"{PIPELINE}.0.to_float32": True}),
        ("plain", {f"{PREPROCESSOR}.test_cfg": dict(size=(56, 64))}),
        ("plain", {f"{PREPROCESSOR}.size_divisor": 64}),  # of training
        (
            "plain",
            {f"{PREPROCESSOR}.test_cfg": dict(size_divisor=32)}
            | {f"{PREPROCESSOR}.size": (64, 64), f"{PREPROCESSOR}.pad_val": 3},
        ),
        (
            "plain",
            {PIPELINE: EDGE},
        ),
        (
            "plain",
            {"model.test_cfg": dict(mode="slide", crop_size=(32, 32), stride=(8, 8))},
        ),
    ],
)
def test_pipelines_are_carried_from_file_to_file(
    run_export, segmentor, tmp_path, capsys, kind, options
):
    picture = picture_of(kind, tmp_path)
    cfg, inferencer = run_export(picture, options)
    said = capsys.readouterr().out
    assert f"onnxruntime against torch from {picture.name}: largest" in said
    labels = inferencer.predict(picture).labels
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(segmentor / "weights.pth")["state_dict"])
    steps = [s for s in cfg.test_dataloader.dataset.pipeline if "Ann" not in s["type"]]
    item = Compose(steps)(dict(img_path=str(picture)))
    with torch.inference_mode():
        (sample,) = model.test_step(pseudo_collate([item]))
    expected = sample.pred_sem_seg.data[0].numpy()
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(labels, expected)


def test_an_input_that_the_runtime_makes_otherwise_is_refused(
    run_export, tmp_path, monkeypatch
):
    read = module.read_image
    monkeypatch.setattr(module, "read_image", lambda *x: read(*x)[::-1].copy())
    with pytest.raises(UnsupportedModelError, match="own pipeline and data_prepro"):
        run_export(picture_of("plain", tmp_path), {})
