"""tools/export.py as a person runs it, on a detector trained on real images."""

import dataclasses
import errno
import re

import numpy as np
import onnx
import openvino
import pytest
import torch

from mmcastling.deploy import check_precision
from mmcastling.export import lowering
from mmcastling.run import evaluate, evaluate_exported, load_config
from mmcastling.run import exporting as module
from mmcastling.runtime import ExportedInferencer, ExportedModelError, inferencer
from mmcastling.runtime.model import openvino_has_bf16

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exported(trained, run_command, tmp_path_factory):
    """The trained detector's ONNX file, and what the command said."""
    out = tmp_path_factory.mktemp("exported") / "detector.onnx"
    command = ("export.py", trained.config, trained.masks_off, out)
    done = run_command(*command, fresh=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_command_compares_at_two_sizes_and_prints_latencies(exported):
    out, said = exported
    assert "pruned the auxiliary softmax branch of 2 attentions" in said
    compared = re.findall(r"onnxruntime against torch at (\d+)x(\d+): (\d+) det", said)
    assert len(compared) == len({sizes[:2] for sizes in compared}) == 2
    assert all(int(found) > 0 for *_, found in compared)
    assert len(re.findall(r"torch [\d.]+ ms, onnxruntime [\d.]+ ms", said)) == 2
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_file_evaluates_to_torchs_figures(exported, trained, tmp_path, monkeypatch):
    cfg = load_config(trained.config, work_dir=str(tmp_path))
    expected = evaluate(cfg, trained.masks_off)
    opened = []
    open_model = inferencer.ExportedModel
    monkeypatch.setattr(
        inferencer, "ExportedModel", lambda *x: opened.append(x) or open_model(*x)
    )
    result = evaluate_exported(cfg, exported[0])
    assert len(opened) == 1
    assert result.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, abs=5e-4), name
    assert result.seconds_per_image > 0
    assert result.runtime == "onnxruntime"


def test_the_file_knows_its_classes_and_images(exported, people):
    detector = ExportedInferencer(exported[0])
    assert detector.metadata.classes == ("person",)
    assert detector.metadata.mean == pytest.approx((171.6, 124.7, 188.5))
    image = next((people / "val").iterdir())
    (found,) = detector(image)["predictions"]
    assert set(found) == {"labels", "scores", "bboxes", "masks"}
    masks = np.array(found["masks"])
    assert masks.shape[0] == len(found["bboxes"]) > 0
    assert masks.any()


def operators(path):
    """Of an OpenVINO file: kinds of its operators, and of what each is fed by."""
    ops = openvino.Core().read_model(str(path)).get_ops()
    return [
        (
            op.get_type_name(),
            [
                op.input_value(i).get_node().get_type_name()
                for i in range(op.get_input_size())
            ],
        )
        for op in ops
    ]


@pytest.mark.parametrize(
    ("format", "ending", "precision"),
    [
        ("openvino", ".xml", "int8"),
        ("exported-program", ".pt2", "bf16"),
    ],
)
@pytest.mark.long
def test_every_format_is_compared_lowered_evaluated_and_painted(
    run_command, trained, people, tmp_path, format, ending, precision
):
    if precision == "bf16":
        try:
            check_precision(precision)
        except RuntimeError:  # not on this CPU
            precision = "fp32"
    out = tmp_path / f"detector{ending}"
    arguments = (trained.config, trained.masks_off, out)
    done = run_command(
        *("export.py", *arguments, "--format", format, "--precision", precision)
    )
    assert done.returncode == 0, done.stderr
    runtime = "openvino" if format == "openvino" else "torch"
    said = re.findall(
        rf"^{runtime} against torch at (\d+)x(\d+): (\d+) d", done.stdout, re.M
    )
    assert len(set(said)) == 2 and all(int(found) > 0 for *_, found in said)
    pattern = (
        rf"^{precision} against torch in fp32 at .* detections, (\d+) of both "
        r"unmatched, scores differ by up to (\S+), boxes have IoU (\S+), masks"
    )
    rounded = re.findall(pattern, done.stdout, re.M)
    assert len(rounded) == (0 if precision == "fp32" else 2)
    for _, scores, boxes in rounded:
        assert 0 < float(scores) < 0.1 and 0.7 < float(boxes) <= 1
    beside = {out.name, "detector.bin"} if format == "openvino" else {out.name}
    assert {path.name for path in tmp_path.iterdir()} == beside

    assert ExportedInferencer(out).metadata.precision == precision
    # In processes of their own, as a person runs it: runtimes share none otherwise.
    cfg = load_config(trained.config, work_dir=str(tmp_path / "test"))
    expected = evaluate(cfg, trained.masks_off).metrics
    tested = run_command("test.py", trained.config, out, "--work-dir", tmp_path / "w")
    assert tested.returncode == 0, tested.stderr
    assert f"s per image in {runtime}, median" in tested.stdout
    apart = 5e-4 if precision == "fp32" else 0.05
    found = dict(re.findall(r"(coco/[\w@]+): (-?[\d.]+)", tested.stdout))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        expected, abs=apart
    )

    picture = next((people / "val").iterdir())
    folder = tmp_path / "painted"
    options = ("--out-dir", folder, "--score-thr", 0)
    done = run_command("demo.py", picture, out, *options)
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in folder.iterdir()] == [".png"]

    if format == "openvino":
        kinds = operators(out)
        fed = {kind for kind, inputs in kinds if "FakeQuantize" in inputs}
        assert fed == {"MatMul"}
        exact = [x for kind, x in kinds if kind == "MatMul" and "FakeQuantize" not in x]
        assert len(exact) == 2 * 2  # of tokens with tokens, in two attentions
    elif format == "exported-program":
        program = torch.export.load(out)
        assert {
            value.dtype
            for name, value in program.state_dict.items()
            if name.endswith("attn.qkv.weight")
        } == {torch.float32 if precision == "fp32" else torch.bfloat16}


def test_a_file_in_bf16_is_left_in_float32_and_says_so(
    run_main, trained, tmp_path, quick, as_openvino
):
    if not openvino_has_bf16(openvino):
        pytest.skip("OpenVINO finds no bfloat16 instructions in this CPU")
    quick(as_openvino)
    out = tmp_path / "x.xml"
    arguments = (trained.config, trained.masks_off, out, "--format", "openvino")
    done = run_main("export.py", *arguments, "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^bf16 against torch in fp32", done.stdout, re.M)) == 2
    assert ExportedInferencer(out).metadata.precision == "bf16"
    assert not any("FakeQuantize" in inputs for _, inputs in operators(out))


def test_bf16_files_need_a_cpu_that_has_it(
    run_main, trained, tmp_path, quick, as_openvino, exported, monkeypatch
):
    class Core(openvino.Core):
        def get_property(self, *names):
            assert names == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Core)
    options = ("--format", "openvino", "--precision", "bf16")
    said = refused(run_main, trained, tmp_path / "x.xml", *options)
    assert "OpenVINO finds no instructions for it in this CPU" in said
    # Nor does a file that was made elsewhere run.
    metadata = ExportedInferencer(exported[0]).metadata
    metadata = dataclasses.replace(metadata, precision="bf16")
    as_openvino(None, tmp_path / "x.xml", metadata)
    with pytest.raises(
        ExportedModelError, match=r"x\.xml was exported with .* fp32 or"
    ):
        ExportedInferencer(tmp_path / "x.xml")


@pytest.mark.parametrize("annotated", [True, False])
def test_int8_of_openvino_learns_its_steps_from_training_images(
    run_main, trained, tmp_path, quick, as_openvino, monkeypatch, annotated
):
    seen = []

    def keep(path, out, precision, metadata, feeds):
        seen.extend(feeds)
        for made in path.parent.glob("x.*"):
            (out.parent / made.name).write_bytes(made.read_bytes())

    monkeypatch.setattr(module, "lower", keep)
    quick(as_openvino)
    arguments = (trained.config, trained.masks_off, tmp_path / "x.xml")
    options = ["--format", "openvino", "--precision", "int8"]
    if not annotated:
        options += ["--cfg-options", "train_dataloader.dataset.ann_file=none.json"]
    done = run_main("export.py", *arguments, *options)
    assert done.returncode == 0, done.stderr
    source = "4 training images" if annotated else "the image compared on, as there are"
    assert f"int8: steps of inputs are from {source}" in done.stdout
    assert len(seen) == (4 if annotated else 2)
    assert {tuple(feed) for feed in seen} == {("images", "image_size")}
    assert all(feed["images"].std() > 0.1 for feed in seen)


@pytest.fixture
def as_openvino(exported):
    """Writes the exported detector as OpenVINO's, whatever graph it is given."""

    def write(graph, path, metadata, *_):
        model = openvino.Core().read_model(str(exported[0]))
        model.set_rt_info(metadata.to_json(), ["mmcastling"])
        openvino.save_model(model, str(path), compress_to_fp16=False)

    return write


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
            ("x.torchscript", "--format", "torchscript"),
            "format 'torchscript' is gone, since torch deprecates TorchScript: choose "
            "one of ['onnx', 'openvino', 'exported-program']",
        ),
        (
            ("x.pt2", "--format", "exported-program", "--precision", "int8"),
            "precision int8 is for --format onnx or openvino, not for exported-program",
        ),
        (
            ("x.onnx", "--precision", "fp16"),
            "fp16 is for --format exported-program, not for onnx: choose that, or one "
            "of ['fp32', 'int8']",
        ),
        (("x.onnx", "--image", "none.jpg"), "image none.jpg does not exist"),
        (
            (
                "x.onnx",
                "--cfg-options",
                "test_dataloader.dataset.pipeline.1.interpolation=spline",
            ),
            "which the runtime does not do with interpolation='spline': use LoadImage",
        ),
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
        monkeypatch.setattr(module, "write_graph", write)

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
    assert ExportedInferencer(out).metadata.precision == "int8"
    full, rounded = (
        ExportedInferencer(path).predict(image) for path in (exported[0], out)
    )
    assert rounded.masks.shape[1:] == full.masks.shape[1:]
    assert 0 < abs(rounded.scores.max() - full.scores.max()) < 0.1


@pytest.mark.parametrize(("int8", "kept"), [(0.5, "int8"), (0.95, "fp32")])
def test_auto_keeps_the_fastest_file_alone(
    run_main, trained, tmp_path, quick, exported, monkeypatch, int8, kept
):
    quick(lambda graph, path, *_: path.write_bytes(exported[0].read_bytes()))
    seconds = dict(fp32=1.0, int8=int8)
    monkeypatch.setattr(
        lowering, "paired_medians", lambda passes, _: {n: seconds[n] for n in passes}
    )
    monkeypatch.setattr(lowering, "MOST_LOST", 1.0)  # this detector finds by chance
    out = tmp_path / "x.onnx"
    arguments = (trained.config, trained.masks_off, out, "--precision", "auto")
    done = run_main("export.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"\n--precision auto: {kept} (" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    kinds = {node.op_type for node in onnx.load(out).graph.node}
    assert ("MatMulInteger" in kinds) == (kept == "int8")


def test_auto_leaves_out_what_is_far_from_torch(
    run_main, trained, tmp_path, quick, exported, monkeypatch
):
    quick(lambda graph, path, *_: path.write_bytes(exported[0].read_bytes()))
    monkeypatch.setattr(lowering, "is_near", lambda agreement: False)
    arguments = (trained.config, trained.masks_off, tmp_path / "x.onnx")
    done = run_main("export.py", *arguments, "--precision", "auto")
    assert done.returncode == 0, done.stderr
    assert "auto: fp32 (" in done.stdout and "; int8 is too far from" in done.stdout


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
