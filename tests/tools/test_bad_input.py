"""Bad input to the commands: one paragraph, a non-zero status, nothing half-written."""

import json

import pytest
import torch

from mmcastling.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def refused(run_main, tmp_path):
    """Run a command that must fail; returns what it said. The folder stays empty."""
    work_dir = tmp_path / "untouched"

    def run(tool, *arguments, status=1, parts=(), may_write=False):
        if tool != "convert.py" and "--work-dir" not in arguments:
            arguments = (*arguments, "--work-dir", work_dir)
        result = run_main(tool, *arguments)
        assert result.returncode == status
        assert "Traceback" not in result.stderr
        (message,) = [line for line in result.stderr.splitlines() if "error: " in line]
        for part in parts:
            assert part in result.stderr, (part, result.stderr)
        assert may_write or not work_dir.exists()
        return message

    return run


# -- configs and options ---------------------------------------------------------------


@pytest.mark.parametrize("tool", ["train.py", "test.py", "convert.py"])
def test_a_missing_config_ends_each_command(tool, refused, tmp_path):
    rest = {"train.py": (), "test.py": ("a.pth",), "convert.py": ("a.pth", "b.pth")}
    parts = ["none.py does not exist: check the path"]
    refused(tool, tmp_path / "none.py", *rest[tool], parts=parts)


def test_a_missing_config_in_a_process_of_its_own(run_command, tmp_path):
    result = run_command("train.py", tmp_path / "none.py", cwd=tmp_path, fresh=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.strip().splitlines()[-1] == (
        f"error: config {tmp_path / 'none.py'} does not exist: check the path"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_config_with_a_syntax_error_gives_the_line(refused, tmp_path):
    (tmp_path / "broken.py").write_text("a = 1\nb = (\n")
    parts = ["broken.py cannot be read", "never closed", "line 2"]
    refused("train.py", tmp_path / "broken.py", parts=parts)


@pytest.mark.parametrize("option", ["data_root", "x=[1,(2]"])
def test_options_that_are_not_key_and_value_are_a_usage_error(
    option, refused, detector_config
):
    parts = ["usage: ", "--cfg-options", "expected KEY=VALUE with balanced brackets"]
    refused("train.py", detector_config, "--cfg-options", option, status=2, parts=parts)


def test_options_that_do_not_fit_the_config(refused, detector_config):
    parts = ["--cfg-options do not fit", "tiny_detector.py", "stem"]
    options = ("--cfg-options", "model.backbone.stem.depth=3")
    refused("train.py", detector_config, *options, parts=parts)


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("model.backbone.arch=huge", ["arch 'huge' is not known", "'nano', 'tiny'"]),
        ("model.backbone.stam=conv", ["CastlingViT", "keyword argument 'stam'"]),
        ("model.backbone.attention.type=sparse", ["'sparse' is not known", "softmax"]),
        ("model.neck.stride=4", ["SimpleFeaturePyramid", "keyword argument 'stride'"]),
        ("model.backbone.type=CastlingVit", ["CastlingVit is not in the", "registry"]),
        ("custom_hooks.0.begin=0.95", ["begin=0.95 is after finish=0.9"]),
        ("custom_hooks.0.finish=1.5", ["finish=1.5 is not a fraction of training"]),
        ("custom_hooks.0.start=1.5", ["1.5 is outside [0, 1]", "'4/N'"]),
        ("custom_hooks.0.finsh=0.5", ["MaskDecayHook", "keyword argument 'finsh'"]),
        (
            "model.backbone.attention={}",
            ["MaskDecayHook found no castling attention", "remove the hook"],
        ),
    ],
)
def test_settings_of_the_model_and_the_hook_are_named(
    option, parts, refused, detector_config
):
    options = [option]
    if option.endswith("{}"):
        start = option.removesuffix("={}")
        options = [f"{start}._delete_=True", f"{start}.type=softmax"]
    # The log of a run that was set up may stay.
    refused(
        *("train.py", detector_config, "--cfg-options", *options),
        parts=parts,
        may_write=True,
    )


def test_an_unknown_launcher_is_a_usage_error(refused, detector_config):
    arguments = ("train.py", detector_config, "--launcher", "ssh")
    refused(*arguments, status=2, parts=["usage: ", "'ssh'", "slurm"])


def test_a_launcher_that_did_not_start_the_command(
    refused, detector_config, monkeypatch
):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    parts = ["--launcher pytorch: the environment lacks RANK", "tools/dist_train.sh"]
    arguments = ("train.py", detector_config, "--launcher", "pytorch")
    refused(*arguments, parts=parts, may_write=True)


def test_a_learning_rate_without_its_batch_size(refused, detector_config):
    options = ("--cfg-options", "auto_scale_lr=None")
    parts = ["--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...)"]
    refused("train.py", detector_config, "--auto-scale-lr", *options, parts=parts)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_work_dir_that_cannot_be_written(below, refused, detector_config, tmp_path):
    (tmp_path / "taken").write_text("keep")
    path = tmp_path / "taken" / below
    parts = ["taken", "cannot be written", "--work-dir"]
    refused("train.py", detector_config, "--work-dir", path, parts=parts)
    assert (tmp_path / "taken").read_text() == "keep"


# -- data ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mask_rcnn_castling_s_coco.py", "cocodataset.org"),
        ("castling_tiny_in1k.py", "image-net.org"),
        ("mask_rcnn_castling_nano_nuclei.py", "prepare_nuclei.py"),
    ],
)
def test_missing_data(name, how, refused, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = ["the data folder data/", how, "data_root=FOLDER", "MMCASTLING_DATA"]
    refused("train.py", root / "configs" / name, parts=parts)
    refused("test.py", root / "configs" / name, "a.pth", parts=parts)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda path, data: path.unlink(), ["val.json"]),
        (lambda path, data: path.write_text(""), ["val.json"]),
        (lambda path, data: path.write_text(json.dumps(data)[:99]), ["val.json"]),
        (lambda path, data: path.write_text("{}"), ["val.json", "images"]),
    ],
    ids=["missing", "empty", "truncated", "malformed"],
)
def test_bad_annotation_files(damage, parts, refused, make_people, trained, tmp_path):
    folder = make_people(tmp_path / "people")
    path = folder / "annotations" / "val.json"
    damage(path, json.loads(path.read_text()))
    options = ("--cfg-options", f"data_root={folder}")
    refused("train.py", trained.config, *options, parts=parts)
    refused("test.py", trained.config, trained.masks_off, *options, parts=parts)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda data: data["categories"][0].update(name="robot"),
            ["'robot'", "the classes are 'person'", "metainfo"],
        ),
        (
            lambda data: data["annotations"][0].update(bbox=[1, 1, 5000, 5]),
            ["bbox [1, 1, 5000, 5]", "leaves its image", "Clip"],
        ),
    ],
    ids=["unknown category", "box outside"],
)
def test_bad_annotations(
    change, parts, refused, make_people, detector_config, tmp_path
):
    folder = make_people(tmp_path / "people")
    path = folder / "annotations" / "train.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    options = ("--cfg-options", f"data_root={folder}")
    refused("train.py", detector_config, *options, parts=parts)


# -- checkpoints -----------------------------------------------------------------------


def test_bad_checkpoints(refused, trained, trained_classifier, attack, tmp_path):
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes(trained.masks_off.read_bytes()[:5000])
    for path, parts in (
        (tmp_path / "none.pth", ["none.pth does not exist"]),
        (tmp_path / "cut.pth", ["cut.pth (5000 bytes) is truncated"]),
        (tmp_path / "list.pth", ["holds a list, expected a dict"]),
        (attack.path, ["attack.pth is refused: it asks to run code"]),
    ):
        refused("test.py", trained.config, path, parts=parts)
        refused("convert.py", trained.config, path, tmp_path / "x.pth", parts=parts)
        refused("train.py", trained.config, "--resume", path, parts=parts)
        options = ("--cfg-options", f"load_from={path}")
        refused("train.py", trained.config, *options, parts=parts)
    parts = ["is of another architecture", "missing backbone.", "and "]
    other = trained_classifier.masks_off
    refused("convert.py", trained.config, other, tmp_path / "x.pth", parts=parts)
    refused("test.py", trained.config, other, parts=parts, may_write=True)
    assert not attack.trace.exists()
    assert not list(tmp_path.glob("x.*"))


def test_shapes_that_differ_are_given(refused, trained, tmp_path):
    options = ("--cfg-options", "model.roi_head.bbox_head.fc_out_channels=64")
    parts = ["shared_fcs.0.weight is (256, ", "the model has (64, "]
    command = ("test.py", trained.config, trained.masks_off)
    refused(*command, *options, parts=parts, may_write=True)


def test_what_cannot_be_resumed(refused, trained, run_main, tmp_path):
    torch.save(
        {"state_dict": load_checkpoint(trained.masks_off)["state_dict"]},
        tmp_path / "bare.pth",
    )
    parts = ["bare.pth holds no training state", "load_from="]
    refused("train.py", trained.config, "--resume", tmp_path / "bare.pth", parts=parts)
    out = tmp_path / "out.pth"
    run_main("convert.py", trained.config, trained.masks_off, out, "--no-verify")
    parts = ["out.pth has been deployed", "nothing to resume"]
    for config in (trained.config, out.with_suffix(".py")):
        refused("train.py", config, "--resume", out, parts=parts)


def test_bad_outputs(refused, trained, tmp_path):
    command = (trained.config, trained.masks_off)
    parts = ["out.json: end the name in .pkl or .pickle"]
    refused("test.py", *command, "--out", tmp_path / "out.json", parts=parts)
    parts = ["is the input"]
    refused("convert.py", *command, trained.masks_off, parts=parts)
    parts = ["--ema was given, but the checkpoint has no averaged weights"]
    refused("convert.py", *command, tmp_path / "x.pth", "--ema", parts=parts)
    parts = ["have not decayed", "--force"]
    command = (trained.config, trained.masks_on)
    refused("convert.py", *command, tmp_path / "x.pth", parts=parts)
    assert not list(tmp_path.glob("x.*"))


def test_options_that_do_not_go_with_the_kind_of_file(
    refused, trained, classifier_config, brightness
):
    parts = ["--runtime openvino runs exported files (.onnx or .xml)", "export the"]
    command = ("test.py", trained.config, trained.masks_off)
    refused(*command, "--runtime", "openvino", parts=parts)
    command = ("test.py", classifier_config, brightness)
    for options, why in (
        (["--no-deploy"], "--no-deploy: the exported file"),
        (["--precision", "bf16"], "--precision bf16: the exported file"),
        (["--tta"], "--tta: the exported file"),
        (["--runtime", "torch"], "torch does not run .onnx files"),
    ):
        refused(*command, *options, parts=[why])
