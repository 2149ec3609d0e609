"""tools/export.py as a person runs it, on a detector trained on real images."""

import errno
import re

import numpy as np
import onnx
import openvino
import pytest

from mmcastling.deploy.runtime import ExportedInferencer
from mmcastling.engine import evaluate, evaluate_exported, load_config
from mmcastling.engine import export as module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(trained, run_command, tmp_path_factory):
    """The trained detector's ONNX file, and what the command said."""
    out = tmp_path_factory.mktemp("exported") / "detector.onnx"
    done = run_command("export.py", trained.config, trained.masks_off, out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_command_compares_at_two_sizes_and_prints_latencies(exported):
    out, said = exported
    assert "pruned the branch of 4 attentions" in said
    compared = re.findall(r"onnxruntime against torch at (\d+)x(\d+): (\d+) det", said)
    assert len(compared) == len({sizes[:2] for sizes in compared}) == 2
    assert all(int(found) > 0 for *_, found in compared)
    assert len(re.findall(r"torch [\d.]+ ms, onnxruntime [\d.]+ ms", said)) == 2
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_file_evaluates_to_torchs_figures(exported, trained, tmp_path):
    cfg = load_config(trained.config, work_dir=str(tmp_path))
    expected = evaluate(cfg, trained.masks_off)
    result = evaluate_exported(cfg, exported[0])
    assert result.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, abs=5e-4), name
    assert result.seconds_per_image > 0
    assert result.runtime == "onnxruntime"


def test_the_file_knows_its_classes_and_images(exported, people):
    inferencer = ExportedInferencer(exported[0])
    assert inferencer.metadata.classes == ("person",)
    assert inferencer.metadata.mean == pytest.approx((171.6, 124.7, 188.5))
    image = next((people / "val").iterdir())
    (found,) = inferencer(image)["predictions"]
    assert set(found) == {"labels", "scores", "bboxes", "masks"}
    masks = np.array(found["masks"])
    assert masks.shape[0] == len(found["bboxes"]) > 0
    assert masks.any()


FORMATS = [
    ("openvino", ".xml", "int8"),
    ("torchscript", ".torchscript", None),
    ("exported-program", ".pt2", "bf16"),
]


@pytest.mark.parametrize(("format", "ending", "precision"), FORMATS)
def test_every_format_is_compared_evaluated_and_painted(
    run_main, trained, people, tmp_path, monkeypatch, format, ending, precision
):
    monkeypatch.setattr("mmcastling.deploy.precision._computes_in", lambda *_: True)
    out = tmp_path / f"detector{ending}"
    arguments = ["export.py", trained.config, trained.masks_off, out]
    arguments += ["--format", format]
    done = run_main(*arguments, *(("--precision", precision) if precision else ()))
    assert done.returncode == 0, done.stderr
    runtime = "openvino" if format == "openvino" else "torch"
    said = re.findall(rf"\n{runtime} against torch at (\d+)x(\d+): (\d+)", done.stdout)
    assert len(set(said)) == 2 and all(int(found) > 0 for *_, found in said)
    rounded = re.findall(rf"\n{precision} against torch in fp32 at ", done.stdout)
    assert len(rounded) == (2 if precision else 0)
    beside = [out.name, "detector.bin"] if format == "openvino" else [out.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(beside)

    inferencer = ExportedInferencer(out)
    assert inferencer.metadata.precision == (precision or "fp32")
    cfg = load_config(trained.config, work_dir=str(tmp_path / "test"))
    expected = evaluate(cfg, trained.masks_off).metrics
    result = evaluate_exported(cfg, out)
    assert result.runtime == runtime
    apart = 0.05 if precision else 5e-4
    assert result.metrics == pytest.approx(expected, abs=apart)

    picture = next((people / "val").iterdir())
    folder = tmp_path / "painted"
    options = ("--out-dir", folder, "--score-thr", 0)
    done = run_main("demo.py", picture, out, *options)
    assert done.returncode == 0, done.stderr
    assert f"by {runtime}" in done.stdout
    assert [path.suffix for path in folder.iterdir()] == [".png"]


def test_bf16_files_need_a_cpu_that_has_it(
    run_main, trained, tmp_path, quick, exported, monkeypatch
):
    class Core(openvino.Core):
        def get_property(self, *names):
            assert names == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8"]

    monkeypatch.setattr("mmcastling.deploy.precision._computes_in", lambda *_: True)
    monkeypatch.setattr(openvino, "Core", Core)

    def copy(graph, path, metadata, *_):
        model = openvino.Core().read_model(str(exported[0]))
        model.set_rt_info(metadata.to_json(), ["mmcastling"])
        openvino.save_model(model, str(path))

    quick(copy)
    arguments = ("x.xml", "--format", "openvino", "--precision", "bf16")
    said = refused(run_main, trained, tmp_path / arguments[0], *arguments[1:])
    assert "for which this CPU has no instructions" in said
    assert not list(tmp_path.iterdir())


def refused(run_main, trained, *arguments, checkpoint=None):
    checkpoint = checkpoint or trained.masks_off
    done = run_main("export.py", trained.config, checkpoint, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_masks_that_have_not_decayed_are_refused(run_main, trained, tmp_path):
    out = tmp_path / "x.onnx"
    said = refused(run_main, trained, out, checkpoint=trained.masks_on)
    assert re.search(r"not decayed: pruning changes the features by up to \d", said)
    assert "--force" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere/x.onnx",), "the folder nowhere does not exist"),
        (("x.engine",), "must end in .onnx"),
        (("x.onnx", "--opset", "9"), "opset 9 is not supported"),
        (("x.onnx", "--format", "tensorrt"), "format 'tensorrt' is not known"),
        (
            ("x.pt2", "--format", "exported-program", "--precision", "int8"),
            "precision int8 is for --format onnx or openvino, not for exported-program",
        ),
        (
            ("x.onnx", "--precision", "fp16"),
            "fp16 is for --format torchscript or exported-program, not for onnx: "
            "choose that, or one of ['fp32', 'int8']",
        ),
        (("x.onnx", "--image", "none.jpg"), "image none.jpg does not exist"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_done(
    run_main, trained, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refused(run_main, trained, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick(monkeypatch):
    """Writing a graph takes no time: the file is a copy of one."""

    def prepare(write):
        monkeypatch.setattr(module, "write", write)

    return prepare


def test_int8_rounds_the_products_and_says_what_that_changes(
    run_main, trained, tmp_path, quick, exported, people
):
    quick(lambda graph, path, *_: path.write_bytes(exported[0].read_bytes()))
    out = tmp_path / "x.onnx"
    arguments = (trained.config, trained.masks_off, out, "--precision", "int8")
    done = run_main("export.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall(r"\nint8 against torch in fp32 at \d+x\d+: ", done.stdout)) == 2
    )
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    kinds = [node.op_type for node in onnx.load(out).graph.node]
    assert "MatMulInteger" in kinds and "Conv" in kinds
    assert out.stat().st_size < 0.8 * exported[0].stat().st_size
    (image, *_) = (people / "val").iterdir()
    full, rounded = (
        ExportedInferencer(path).predict(image) for path in (exported[0], out)
    )
    assert rounded.masks.shape[1:] == full.masks.shape[1:]
    assert 0 < abs(rounded.scores.max() - full.scores.max()) < 0.1


def test_a_full_disk_leaves_what_was_there(run_main, trained, tmp_path, quick):
    out = tmp_path / "x.onnx"
    out.write_bytes(b"before")

    def fill(graph, path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    quick(fill)
    assert "No space left" in refused(run_main, trained, out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_bytes() == b"before"


def test_a_file_that_disagrees_is_removed(
    run_main, trained, tmp_path, quick, exported, monkeypatch
):
    quick(lambda graph, path, *_: path.write_bytes(exported[0].read_bytes()))
    original = module.reference_outputs

    def moved(*arguments):
        outputs = original(*arguments)
        return {**outputs, "boxes": outputs["boxes"] + 5}

    monkeypatch.setattr(module, "reference_outputs", moved)
    said = refused(run_main, trained, tmp_path / "x.onnx")
    assert "disagrees with torch in onnxruntime" in said
    assert not list(tmp_path.iterdir())
