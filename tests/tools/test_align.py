"""tools/align.py and tools/scan.py: from a trained softmax model to a castled one."""

import json

import cv2
import numpy as np
import pytest
import torch

from mmcastling.checkpoint import load_checkpoint
from mmcastling.named_models import build_named_model
from mmcastling.run import load_config
from mmcastling.run.load import build_model, load_model
from mmcastling.verbs import castling_modules

pytestmark = pytest.mark.slow

NAME = "timm:vit_wee_patch16_reg1_gap_256"
SMALL = ("--size", "64", "96", "--batch-size", "2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for index in range(6):
        coarse = noise.integers(0, 255, (6, 8, 3), np.uint8)
        picture = cv2.resize(coarse, (128, 96), interpolation=cv2.INTER_CUBIC)
        assert cv2.imwrite(str(folder / f"{index}.png"), picture)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(build_named_model(NAME).state_dict(), path)
    return path


def test_a_model_of_timm_is_aligned_and_loaded_again(
    pictures, weights, run_main, tmp_path
):
    arguments = (NAME, weights, pictures, tmp_path / "out", *SMALL, "--steps", 1, 1)
    arguments += ("--keep", "-1", "--lr", 1e-4, 1e-5)
    done = run_main("align.py", *arguments)
    assert done.returncode in (0, None), done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["kept"][0] in done.stdout and len(report["kept"]) == 1
    assert list(report["cosines_after"]) == ["64x96"]
    assert (tmp_path / "out" / "errors.png").read_bytes()[:4] == b"\x89PNG"
    model = build_named_model(NAME, str(tmp_path / "out" / "aligned.pth"))
    modules = dict(castling_modules(model))
    assert len(modules) == len(report["errors_after"])
    assert not any(module.mask_is_on for module in modules.values())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"aligned.pth", "errors.png", "report.json", "settings.json"}
    # It is finished: the same again says so, and something else is refused.
    before = (tmp_path / "out" / "aligned.pth").read_bytes()
    again = run_main("align.py", *arguments)
    assert again.returncode in (0, None)
    assert again.stdout.splitlines() == done.stdout.splitlines()
    for other in (
        ("--attention", "landmarks=2"),
        ("--attention", "norm_output=true"),
        ("--keep", 0),
        ("--seed", 1),
        ("--size", "32", "32"),
    ):
        refused = run_main("align.py", *arguments, *other)
        assert refused.returncode == 1
        assert "is of an alignment with" in refused.stderr
    assert (tmp_path / "out" / "aligned.pth").read_bytes() == before


def test_what_was_refused_leaves_the_folder_free(pictures, weights, run_main, tmp_path):
    arguments = (NAME, weights, pictures, tmp_path / "out", *SMALL)
    for bad, message in (
        (("--steps", 0, 0), "steps (0, 0)"),
        (("--lr", "nan", 1), "learning rates (nan, 1.0)"),
        (("--keep", "auto", "--budget", 99), "budget=99"),
    ):
        refused = run_main("align.py", *arguments, *bad)
        assert refused.returncode == 1 and message in refused.stderr, refused.stderr
    done = run_main("align.py", *arguments, "--steps", 1, 0)
    assert done.returncode in (0, None), done.stderr[-3000:]


def test_a_killed_run_goes_on_with_what_it_had_chosen(
    pictures, weights, run_main, tmp_path, monkeypatch
):
    from mmcastling.alignment import aligning
    from mmcastling.run import align_model as module

    arguments = (NAME, weights, pictures, tmp_path, *SMALL, "--steps", 1, 2)
    arguments += ("--keep", "auto", "--budget", 3)
    features = aligning._match_features

    def dying(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(aligning, "_match_features", dying)
    with pytest.raises(KeyboardInterrupt):
        module.align_model(
            *(NAME, str(weights), pictures, tmp_path),
            **dict(sizes=[(64, 96)], batch_size=2, steps=(1, 2), keep="auto", budget=3),
        )
    chosen = json.loads((tmp_path / "settings.json").read_text())["kept"]
    assert len(chosen) == 3 and (tmp_path / "align.pth").exists()
    monkeypatch.setattr(aligning, "_match_features", features)
    monkeypatch.setattr(module, "scan", dying)  # it is not scanned again
    done = run_main("align.py", *arguments)
    assert done.returncode in (0, None), done.stderr[-3000:]
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == chosen


@pytest.fixture
def softmax_config(classifier_config, tmp_path):
    path = tmp_path / "softmax.py"
    path.write_text(
        f"_base_ = [{str(classifier_config)!r}]\n"
        "model = dict(backbone=dict(attention=dict(_delete_=True, type='softmax')))\n"
        "custom_hooks = []\n"
    )
    torch.manual_seed(0)
    checkpoint = tmp_path / "softmax.pth"
    torch.save(dict(state_dict=build_model(load_config(path)).state_dict()), checkpoint)
    return path, checkpoint


def test_a_config_is_aligned_converted_and_tested(
    softmax_config, pictures, run_main, tmp_path
):
    out = tmp_path / "out"
    refused = run_main("align.py", *softmax_config, pictures, out, "--size", 2, 2)
    assert refused.returncode == 1 and "refuses an image of 2x2" in refused.stderr
    arguments = (*softmax_config, pictures, out, *SMALL, "--steps", 1, 1)
    done = run_main("align.py", *arguments, "--keep", 0)
    assert done.returncode in (0, None), done.stderr[-3000:]
    config, checkpoint = out / "aligned.py", out / "aligned.pth"
    model = load_model(load_config(config), load_checkpoint(checkpoint), checkpoint)
    assert len(dict(castling_modules(model))) == len(model.backbone.layers) - 1
    converted = run_main("convert.py", config, checkpoint, tmp_path / "deployed.pth")
    assert converted.returncode in (0, None), converted.stderr[-3000:]
    results = [
        run_main("test.py", *files, "--work-dir", tmp_path / "test").stdout
        for files in (
            (config, checkpoint),
            (tmp_path / "deployed.py", tmp_path / "deployed.pth"),
        )
    ]
    accuracy = [text.rpartition("accuracy/top1")[2][:12] for text in results]
    assert accuracy[0] == accuracy[1] != ""


def test_a_scan_prints_draws_and_writes_its_table(
    pictures, weights, run_main, tmp_path
):
    table, drawing = tmp_path / "scan.json", tmp_path / "scan.png"
    arguments = (
        NAME,
        weights,
        pictures,
        *SMALL,
        "--attention",
        "form=released",  # of weights drawn at random the default does none
        "--json",
        table,
        "--out",
        drawing,
    )
    done = run_main("scan.py", *arguments)
    assert done.returncode in (0, None), done.stderr[-3000:]
    rows = json.loads(table.read_text())
    assert all(row["name"] in done.stdout for row in rows)
    assert all(row["damage"] > 0 for row in rows), rows
    assert drawing.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--keep", "99"), "99"),
        (("--keep", "auto", "--budget", "99"), "budget=99"),
        (("--batch-size", "0"), "batch_size 0"),
        (("--steps", "0", "0"), r"steps (0, 0)"),
        (("--attention", "form=odd"), "'odd'"),
        (("--attention", "center_keys=off"), "center_keys 'off' must be True or False"),
        (("--attention", "grid=3"), "grid=3"),
        (("--attention", "stages=1"), "stages=1"),
    ],
)
def test_bad_arguments_end_in_a_line_that_names_them(
    arguments, message, pictures, weights, run_main, tmp_path
):
    out = tmp_path / "out"
    done = run_main("align.py", NAME, weights, pictures, out, *SMALL, *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (out / "aligned.pth").exists()


def test_pictures_that_are_not_there(weights, run_main, tmp_path):
    done = run_main("align.py", NAME, weights, tmp_path / "none", tmp_path / "out")
    assert done.returncode == 1
    assert "no picture that can be read" in done.stderr
