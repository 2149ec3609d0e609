"""tools/doctor.py and tools/export.py on models of libraries, as a person runs them."""

import json

import pytest

pytest.importorskip("timm")


def test_the_doctor_prints_draws_and_stores(run_main, tmp_path):
    json_file, png = tmp_path / "x.json", tmp_path / "x.png"
    options = ("--size", 64, 96, "--json", json_file, "--out", png)
    done = run_main("doctor.py", "timm:test_vit", *options)
    assert done.returncode == 0, done.stderr
    facts = json.loads(json_file.read_text())
    assert f"verdict: {facts['verdict']}" in done.stdout
    assert facts["name"] == "timm:test_vit" and png.stat().st_size > 1000


@pytest.mark.slow
def test_a_named_model_is_exported(run_main, tmp_path):
    out = tmp_path / "m.onnx"
    done = run_main("export.py", "timm:test_vit", out, "--size", 160, 160)
    assert done.returncode == 0, done.stderr
    assert (
        f"wrote {out}: VisionTransformer in fp32, batch and height and width"
        in done.stdout
    )
    assert "at 3x3x128x512: largest difference" in done.stdout
    assert "latency at 3x3x160x160: torch" in done.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("doctor.py", "timm:test_vitt"), "do you mean"),
        (("doctor.py", "tim:test_vit"), "no config and no model's name"),
        (("doctor.py", "none.py"), "does not exist"),
        (("doctor.py", "timm:resnet18", "--size", "64", "64"), "do not castle this"),
        (("doctor.py", "timm:test_vit", "--size", "-1", "64"), "two positive integers"),
        (("doctor.py", "timm:test_vit", "--out", "x.gif"), "end the name in .png"),
        (("doctor.py", "timm:test_vit", "none.pth"), "does not exist"),
        (("export.py", "timm:test_vit"), "name the file to write"),
        (("export.py", "timm:test_vit", "x.onnx", "--image", "x"), "is for configs"),
        (("export.py", "timm:test_vit", "x.xyz"), "x.xyz does not exist"),
        (
            ("export.py", "timm:test_vit", "x.onnx", "--format", "openvino"),
            "is no file",
        ),
        (("export.py", "configs/castling_tiny_in1k.py"), "needs its checkpoint"),
    ],
)
def test_bad_input_is_one_line(run_main, command, words):
    done = run_main(*command)
    assert done.returncode == 1
    assert words in done.stderr and done.stderr.count("error: ") == 1
