"""Any module as a file: what stays free, what is compared, what is refused."""

import pytest
import torch
from torch import nn

import mmcastling
from mmcastling.errors import OptionError, UserError
from mmcastling.export import (
    DisagreementError,
    any_module,
    cases,
    check_export_precision,
)
from mmcastling.runtime import ExportedInferencer, ExportedModel, ExportedModelError


def castled_vit(**options):
    vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    torch.manual_seed(0)
    size = dict(img_size=64, dynamic_img_size=True, num_classes=5)
    model = vit(embed_dim=24, depth=2, num_heads=3, **{**size, **options}).eval()
    model = mmcastling.castle(model, local_conv="grid")
    mmcastling.set_mask(model, 1.0)
    return model


class Named(nn.Module):
    """Two inputs, a dict of outputs, and a size that is fixed."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8, 8)

    def forward(self, images, shift):
        x = self.conv(images).reshape(images.shape[0], 4, 16) + shift[:, None, None]
        return dict(maps=x, more=(x.mean(2), shift * 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"),
    [("m.onnx", "int8"), ("m.onnx", "auto"), ("m.xml", "bf16"), ("m.pt2", "bf16")],
)
def test_a_file_in_lower_precision_says_so_and_stays_near(
    tmp_path, monkeypatch, name, precision
):
    # Two sizes suffice here; all are in the test below.
    monkeypatch.setattr(cases, "_sizes", lambda *_: iter([[(80, 96)]]))
    if precision == "bf16":
        try:
            check_export_precision(
                precision, "openvino" if name == "m.xml" else "exported-program"
            )
        except RuntimeError as error:
            pytest.skip(str(error))
    model, path = castled_vit(), tmp_path / name
    report = mmcastling.export(
        model, path, torch.randn(1, 3, 64, 64), precision=precision
    )
    text = str(report)
    if precision == "auto":
        assert "--precision auto: " in text and "int8" in text
    else:
        assert (
            report.precision == precision
            and f"VisionTransformer in {precision}," in text
        )
        assert f"{precision} against torch at 1x3x80x96: largest difference" in text
    assert "onnxruntime against torch at 1x3x64x64" in text or name != "m.onnx"
    file = ExportedModel(path)
    assert file.metadata.precision == report.precision
    images = torch.randn(1, 3, 80, 96)
    with torch.no_grad():
        expected = model(images)
    (got,) = file(images).values()
    apart = (torch.from_numpy(got) - expected).abs().max()
    assert apart < 0.1 * expected.abs().max().clamp_min(1)
    assert report.precision == "fp32" or apart > 1e-6
    assert {item.suffix for item in tmp_path.iterdir()} <= {path.suffix, ".bin"}


@pytest.mark.slow
def test_a_castled_model_is_free_in_all_and_knows_its_grid(tmp_path):
    model, path = castled_vit(), tmp_path / "m.onnx"
    example = torch.randn(1, 3, 64, 64)
    report = mmcastling.export(model, path, example)
    assert report.dynamic == ("batch", "height", "width")
    # 8 x 32 tokens are as many as 16 x 16
    assert {"1x3x128x512", "3x3x64x64", "3x3x128x512"} <= set(report.agreements)
    assert {"1x3x96x64", "1x3x48x48", "5x3x64x64"} <= set(report.agreements)
    assert str(report).count("latency at") == 2  # of the example and of a batch
    assert [item.name for item in tmp_path.iterdir()] == ["m.onnx"]
    assert any(True for _ in mmcastling.castling_modules(model))  # a copy is deployed
    images = torch.randn(2, 3, 32, 80)
    with torch.no_grad():
        (got,) = ExportedModel(path)(images).values()
        torch.testing.assert_close(
            torch.from_numpy(got), model(images), atol=1e-4, rtol=0
        )
    with pytest.raises(ExportedModelError, match="give batches to ExportedModel"):
        ExportedInferencer(path)


class Bent(nn.Module):
    """Does something else where its images are of some shapes."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.where = nn.Conv2d(3, 4, 8, 8), where

    def forward(self, images):
        x = self.conv(images)
        return -x if self.where(*images.shape) else x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "shape"),
    [
        (lambda b, c, h, w: h > w, (1, 3, 128, 64)),
        (lambda b, c, h, w: h < 60, (1, 3, 40, 40)),
        (lambda b, c, h, w: b > 4, (8, 3, 64, 64)),
        (lambda b, c, h, w: h % 8 != 0, (1, 3, 70, 64)),
    ],
    ids=["high", "small", "many", "not divisible"],
)
def test_what_torch_assumes_of_the_traced_shape_is_no_freedom(tmp_path, where, shape):
    torch.manual_seed(0)
    model, path = Bent(where).eval(), tmp_path / "m.onnx"
    report = mmcastling.export(model, path, torch.randn(2, 3, 64, 64))
    axes = [("batch", 2, shape[0]), ("height", 64, shape[2]), ("width", 64, shape[3])]
    bent = {name for name, traced, asked in axes if traced != asked}
    assert not bent <= set(report.dynamic)


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_what_cannot_be_free_is_said(tmp_path, ending):
    path = tmp_path / f"m.{ending}"
    example = (torch.randn(2, 3, 32, 32), torch.randn(2))
    report = mmcastling.export(Named().eval(), path, example)
    assert report.dynamic == ("batch",)
    assert report.outputs == ("maps", "more_0", "more_1")
    assert "the model refuses other images than 32x32" in str(report)
    assert set(report.agreements) == {
        "2x3x32x32",
        "1x3x32x32",
        "3x3x32x32",
        "5x3x32x32",
    }
    assert path.is_file()


def test_a_format_that_fixes_the_batch_is_fallen_back_from(tmp_path, monkeypatch):
    write, tried = any_module.write, []

    def stubborn(*args, dynamic_shapes, **options):
        tried.append(dynamic_shapes[0][0])
        if tried[-1]:
            raise any_module.UnsupportedModelError("no")
        write(*args, dynamic_shapes=dynamic_shapes, **options)

    monkeypatch.setattr(any_module, "write", stubborn)
    example = (torch.randn(2, 3, 32, 32), torch.randn(2))
    report = mmcastling.export(Named().eval(), tmp_path / "m.pt2", example)
    assert len(tried) == 2 and report.dynamic == ()
    assert "not with free batch: no" in str(report)


def test_what_disagrees_leaves_nothing(tmp_path, monkeypatch):
    in_torch = any_module._in_torch
    monkeypatch.setattr(
        any_module,
        "_in_torch",
        lambda *args: {name: x + 1 for name, x in in_torch(*args).items()},
    )
    example = (torch.randn(2, 3, 32, 32), torch.randn(2))
    with pytest.raises(DisagreementError, match="disagrees with torch in torch"):
        mmcastling.export(Named().eval(), tmp_path / "m.pt2", example)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "example", "words"),
    [
        ("m.engine", torch.randn(1, 3, 64, 64), "must end in one of"),
        ("none/m.onnx", torch.randn(1, 3, 64, 64), "does not exist"),
        ("m.onnx", torch.randn(1, 3, 60, 64), "does not take the example"),
        ("m.onnx", [1, 2], "must be a tensor or several"),
        ("m.onnx bf16", torch.randn(1, 3, 64, 64), "bf16 is for --format openvino"),
        ("m.onnx fp8", torch.randn(1, 3, 64, 64), "'fp8' is not one of exported"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path, name, example, words
):
    name, _, precision = name.partition(" ")
    options = dict(precision=precision) if precision else {}
    with pytest.raises(UserError, match=words):
        mmcastling.export(castled_vit(), tmp_path / name, example, **options)
    assert not list(tmp_path.iterdir())


def test_masks_that_are_on_are_refused(tmp_path):
    model = castled_vit()
    mmcastling.set_mask(model, "4/N")
    with pytest.raises(OptionError, match=r"not decayed \(blocks.0.attn.mixer and 1"):
        mmcastling.export(model, tmp_path / "m.onnx", torch.randn(1, 3, 64, 64))
