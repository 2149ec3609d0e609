"""Exported graphs say what torch says, at sizes and batches they were not traced at."""

import subprocess
import sys

import numpy as np
import pytest
import small_levit
import torch
from torch import nn
from torch.testing import assert_close

from mmcastling.export import (
    UnsupportedModelError,
    check_export_precision,
    check_format,
    compare,
    compare_detections,
    describe,
    export_graph,
    reference_outputs,
    write,
    write_graph,
)
from mmcastling.export.detectors import first_rows
from mmcastling.export.nncf_process import quantize_in_subprocess
from mmcastling.export.pools import AnySizeAdaptivePool
from mmcastling.run import load_config
from mmcastling.run.load import build_model
from mmcastling.runtime import (
    RUNTIMES,
    SUFFIXES,
    ExportedInferencer,
    ExportedModel,
    ExportedModelError,
)
from mmcastling.runtime.model import runtime_library
from mmcastling.verbs import switch_to_deploy

ENDINGS = {"onnx": "onnx", "openvino": "xml", "exported-program": "pt2"}
NANO = {"model.backbone.arch": "nano"}
ARCH = dict(embed_dims=128, num_layers=2, num_heads=4, feedforward_channels=256)
# What an export costs is its number of layers.
TWO_LAYERS = {"model.backbone.arch": dict(ARCH, _delete_=True)}
LEVIT = {
    **small_levit.TWO_STAGES,
    "model.bbox_head.stacked_convs": 1,
    "model.bbox_head.num_classes": 5,
    "model.test_cfg.score_thr": 0.0,
    "model.test_cfg.nms_pre": 50,
}
# Untrained detectors: no threshold that all scores would miss, and few boxes.
MODELS = {
    "mask_rcnn": (
        "mask_rcnn_castling_nano_nuclei",
        {
            **TWO_LAYERS,
            "model.test_cfg.rcnn.score_thr": 0.0,
            "model.test_cfg.rcnn.max_per_img": 30,
            "model.roi_head.bbox_head.num_classes": 3,
            "model.roi_head.bbox_head.reg_class_agnostic": False,
            "model.roi_head.mask_head.num_classes": 3,
            "model.roi_head.mask_head.num_convs": 1,
        },
    ),
    "retinanet": (
        "retinanet_castling_levit_256_coco",
        {
            **LEVIT,
            "model.neck.out_channels": 32,
            "model.neck.num_outs": 4,
            "model.bbox_head.anchor_generator.strides": [8, 16, 32, 64],
            "model.bbox_head.in_channels": 32,
            "model.bbox_head.feat_channels": 32,
        },
    ),
    "rtmdet": (
        "rtmdet_castling_levit_128_coco",
        {**LEVIT, "model.bbox_head.anchor_generator.strides": [8, 16, 32]},
    ),
    "classifier": (
        "castling_tiny_in1k",
        {**TWO_LAYERS, "model.head.in_channels": 128, "model.head.num_classes": 10},
    ),
}


def built(root, name, **more):
    config, options = MODELS[name]
    cfg = load_config(root / "configs" / f"{config}.py", {**options, **more})
    torch.manual_seed(0)
    model = build_model(cfg)
    for parameter in model.parameters():  # biases and scales that are not 0 and 1
        if parameter.ndim == 1:
            nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    for layer in getattr(getattr(model, "bbox_head", None), "rtm_reg", ()):
        nn.init.constant_(layer.bias, 1.0)  # sides of a box on both sides of its point
    return switch_to_deploy(model.eval()).eval()


def exported(model, folder, kind="onnx", part="model"):
    graph = export_graph(model, part)
    path = folder / f"model.{ENDINGS[kind]}"
    write_graph(graph, path, describe(model, graph, part, kind), kind)
    return ExportedInferencer(path, threads=None if kind.startswith("exp") else 1)


def picture(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def assert_agrees(inferencer, model, images, size=None):
    size = size or tuple(images.shape[2:])
    with torch.inference_mode():
        expected = reference_outputs(model, inferencer.metadata.kind, images, size)
    got = inferencer.model(images, size)
    if inferencer.metadata.kind == "detector":
        result = compare_detections(expected, got, size)
    else:
        result = compare(expected, got)
    assert result.holds, str(result)
    return result


@pytest.fixture(scope="module")
def mask_rcnn(root, tmp_path_factory):
    """Mask R-CNN and its ONNX file."""
    model = built(root, "mask_rcnn")
    folder = tmp_path_factory.mktemp("mask_rcnn")
    return model, exported(model, folder)


@pytest.mark.slow
def test_mask_rcnn_agrees_at_any_size(mask_rcnn):
    model, inferencer = mask_rcnn
    for height, width in ((128, 192), (256, 160)):
        result = assert_agrees(inferencer, model, picture(height, width))
        assert result.found == 30
        assert result.mask_iou > 0.999


@pytest.mark.slow
def test_boxes_are_clipped_to_the_image_inside_its_padding(mask_rcnn):
    model, inferencer = mask_rcnn
    images = picture(128, 192)
    assert_agrees(inferencer, model, images, (101, 180))
    boxes = inferencer.model(images, (101, 180))["boxes"]
    assert boxes.max(axis=0).tolist() <= [180, 101, 180, 101]


@pytest.mark.slow
def test_only_standard_operators_are_used(mask_rcnn):
    import onnx

    _, inferencer = mask_rcnn
    model = onnx.load(inferencer.model.path)
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    assert {node.domain for node in nodes} <= {""}
    kinds = {node.op_type for node in nodes}
    assert {"RoiAlign", "NonMaxSuppression"} <= kinds


@pytest.mark.slow
def test_openvino_reads_the_onnx_file_too(mask_rcnn):
    model, inferencer = mask_rcnn
    other = ExportedInferencer(inferencer.model.path, "openvino", threads=1)
    assert other.metadata == inferencer.metadata
    assert_agrees(other, model, picture(128, 192))


@pytest.mark.slow
def test_nothing_found_is_no_error(mask_rcnn, tmp_path):
    import onnx

    _, inferencer = mask_rcnn
    model = onnx.load(inferencer.model.path)
    (bias,) = (x for x in model.graph.initializer if x.name.endswith("fc_cls.bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[-1] += 1000  # all is background: no other score is above the threshold, 0
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "nothing.onnx")
    inferencer = ExportedInferencer(tmp_path / "nothing.onnx", threads=1)
    found = inferencer.model(picture(128, 128))
    assert {name: value.shape for name, value in found.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
        "masks": (0, 28, 28),
    }
    assert len(inferencer.predict(np.zeros((60, 70, 3), np.uint8)).boxes) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet", "rtmdet"])
@pytest.mark.long
def test_one_stage_detectors_agree_at_any_size(root, tmp_path, name):
    model = built(root, name)
    inferencer = exported(model, tmp_path)
    other = ExportedInferencer(inferencer.model.path, "openvino", threads=1)
    for height, width in ((128, 192), (256, 128)):
        assert assert_agrees(inferencer, model, picture(height, width)).found > 0
        assert_agrees(other, model, picture(height, width))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "kind"), [("model", "onnx"), ("backbone", "openvino")]
)
def test_classifiers_take_any_batch_and_size(root, tmp_path, part, kind):
    model = built(root, "classifier")
    inferencer = exported(model, tmp_path, kind, part)
    for batch, height, width in ((1, 224, 224), (3, 96, 160), (1, 101, 77)):
        images = picture(height, width, batch)
        got = inferencer.model(images)
        for index in range(batch):
            one = {name: value[index : index + 1] for name, value in got.items()}
            expected = reference_outputs(
                model,
                inferencer.metadata.kind,
                images[index : index + 1],
                (height, width),
            )
            for name, value in expected.items():
                np.testing.assert_allclose(one[name], value, atol=1e-4)


SEGMENTOR = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(type="SegDataPreProcessor", mean=[1, 2, 3], std=[4, 5, 6]),
    backbone=dict(
        type="mmcastling.CastlingViT",
        arch=ARCH,
        img_size=64,
        patch_size=8,
        with_cls_token=False,
        out_type="featmap",
        out_indices=(0, 1),
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[128, 128],
        in_index=[0, 1],
        pool_scales=(1, 6),
        channels=16,
        num_classes=4,
        norm_cfg=dict(type="BN"),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)


@pytest.mark.slow
@pytest.mark.long
def test_segmentors_agree_at_any_size(tmp_path):
    config = tmp_path / "segmentor.py"
    config.write_text(f"default_scope = 'mmseg'\nmodel = {SEGMENTOR!r}\n")
    torch.manual_seed(0)
    model = switch_to_deploy(build_model(load_config(config)).eval()).eval()
    inferencer = exported(model, tmp_path)
    for height, width in ((64, 96), (136, 88), (72, 201)):
        assert_agrees(inferencer, model, picture(height, width))
    found = inferencer.predict(np.full((50, 70, 3), 99, np.uint8))
    assert found.labels.shape == (50, 70)


@pytest.mark.slow
def test_programs_of_torch_take_one_image_and_name_the_smallest(tmp_path):
    backbone = dict(
        SEGMENTOR["backbone"],
        arch=dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16),
        out_indices=-1,
        attention=dict(local_conv="grid"),
    )
    head = dict(SEGMENTOR["decode_head"], in_channels=[16], in_index=[0])
    config = tmp_path / "segmentor.py"
    model = dict(SEGMENTOR, backbone=backbone, decode_head=head)
    config.write_text(f"default_scope = 'mmseg'\nmodel = {model!r}\n")
    torch.manual_seed(0)
    model = switch_to_deploy(build_model(load_config(config)).eval()).eval()
    inferencer = exported(model, tmp_path, "exported-program", "backbone")
    for height, width in ((64, 64), (9, 40), (16, 9)):
        assert_agrees(inferencer, model, picture(height, width))
    with pytest.raises(ExportedModelError, match="must be at least 9 and"):
        inferencer.model(picture(8, 64))


# -- without torch ---------------------------------------------------------------------

WITHOUT = """
import sys
for name in [*sys.argv[4:], *"mmengine mmcv mmdet mmpretrain mmseg timm".split()]:
    sys.modules[name] = None
import numpy as np
from mmcastling.runtime import ExportedInferencer
found = ExportedInferencer(sys.argv[1], threads=1).predict(np.load(sys.argv[2]))
np.savez(sys.argv[3], **vars(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("missing", [("torch", "torchvision"), ()])
def test_runs_without_openmmlab_with_torch_or_without(mask_rcnn, tmp_path, missing):
    _, inferencer = mask_rcnn
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    np.save(tmp_path / "image.npy", image)
    files = (inferencer.model.path, tmp_path / "image.npy", tmp_path / "out.npz")
    command = [sys.executable, "-c", WITHOUT, *map(str, files), *missing]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = inferencer.predict(image)
    with np.load(tmp_path / "out.npz") as found:
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(found[name], value)
    assert expected.masks.shape == (30, 90, 120)


# -- what is refused -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 130, 128), "multiples of 16"),
        ((2, 3, 128, 128), "takes 1 image at once, got 2"),
        ((3, 128, 128), r"\(B, 3, H, W\)"),
    ],
)
def test_inputs_that_the_file_cannot_take_are_refused(mask_rcnn, shape, said):
    _, inferencer = mask_rcnn
    with pytest.raises(ExportedModelError, match=said):
        inferencer.model(np.zeros(shape, np.float32))


class Mixed(nn.Module):
    """No model of any toolbox: two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x, scale):
        y = self.layer(x) * scale
        return y, y.softmax(-1)


@pytest.mark.parametrize("kind", ENDINGS)
def test_any_module_can_be_written_run_back_and_compared(tmp_path, kind):
    module = Mixed().eval().requires_grad_(False)
    path = tmp_path / f"module.{ENDINGS[kind]}"
    write(
        *(module, path, (torch.randn(3, 8), torch.randn(3, 1))),
        format=kind,
        outputs=["y", "p"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC}),
        metadata="{}",
    )
    runtime = SUFFIXES[path.suffix][0]
    session = RUNTIMES[runtime](path, runtime_library(runtime), None)
    assert (session.inputs, session.metadata) == (("x", "scale"), "{}")
    for rows in (3, 7):
        x, scale = torch.randn(rows, 8), torch.randn(rows, 1)
        feeds = dict(x=x.numpy(), scale=scale.numpy())
        got = dict(zip("yp", session.run(feeds), strict=True))
        expected = dict(zip("yp", (v.numpy() for v in module(x, scale)), strict=True))
        assert compare(expected, got).holds
        assert not compare(expected, dict(got, y=got["y"] + 1)).holds


class FirstTen(nn.Module):
    def forward(self, x):
        return first_rows(x, 10)


@pytest.mark.parametrize("traced", [4, 20])
def test_cuts_hold_at_sizes_on_both_sides_of_the_one_traced(traced):
    program = torch.export.export(
        FirstTen(),
        (torch.zeros(traced),),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for length in (3, 10, 30):
        x = torch.arange(length)
        assert_close(program.module()(x.float()), x[:10].float())


@pytest.mark.parametrize("size", [(6, 6), (7, 13), (12, 5), (3, 2)])
@pytest.mark.parametrize("output", [1, 2, 3, (6, 2)])
def test_pooling_of_any_size_is_torchs(size, output):
    x = picture(*size, batch=2)
    assert_close(AnySizeAdaptivePool(output)(x), nn.AdaptiveAvgPool2d(output)(x))


def test_formats_and_opsets_that_are_not_supported_are_named():
    with pytest.raises(ValueError, match="'tflite' is not known: choose one of"):
        check_format("tflite")
    with pytest.raises(ValueError, match=r"'torchscript' is gone.* choose one of"):
        check_format("torchscript")
    with pytest.raises(ValueError, match="opset 7 is not supported: choose one from"):
        check_format("onnx", 7)


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "openvino"])
def test_a_missing_library_says_what_to_install(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RuntimeError, match=f"pip install {library}"):
        check_format("openvino")


def test_a_missing_nncf_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    check_export_precision("fp32", "openvino")
    with pytest.raises(RuntimeError, match="int8 of openvino needs nncf: pip install"):
        check_export_precision("int8", "openvino")


@pytest.mark.slow
def test_what_nncf_says_in_its_own_process_is_passed_on(tmp_path):
    source = tmp_path / "damaged.xml"
    source.write_text("no graph")
    feeds = [{"images": np.zeros((1, 3, 64, 64), np.float32)}]
    with pytest.raises(RuntimeError, match="NNCF failed: "):
        quantize_in_subprocess(source, tmp_path / "out.xml", feeds)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.xml"]


def test_models_without_an_exportable_form_are_named(root):
    cfg = load_config(root / "configs" / "cascade_mask_rcnn_castling_s_coco.py", NANO)
    cfg.merge_from_dict({"model.neck.in_channels": 128})
    model = build_model(cfg).eval()
    with pytest.raises(UnsupportedModelError, match=r"CascadeRoIHead.*--part backbone"):
        export_graph(model)
    assert export_graph(model, "backbone") is not None


def test_loading_what_another_program_wrote_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = helper.make_node("Relu", ["x"], ["y"])
    graph = helper.make_graph([node], "g", [value], [other])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ExportedModelError, match=r"tools/export\.py"):
        ExportedModel(tmp_path / "other.onnx")
