"""The speed benchmarks: fair contenders, honest targets, machines kept apart."""

import copy
import dataclasses
import json
import sys

import pytest
import torch
from torch.testing import assert_close

NAMES = ("attention", "backbones", "precision", "detectors", "runtimes")
NAMES += ("training_steps",)


@pytest.fixture
def layers(load_benchmark):
    return load_benchmark("attention")


@pytest.fixture
def report(load_benchmark):
    return load_benchmark("report")


@pytest.fixture
def stored(report):
    paths = [p for script in report.SCRIPTS.values() for p in script.BENCHMARK.stored]
    return report.read(paths)


@pytest.fixture
def of_one_kind(stored):
    return stored["avx512"]


# -- contenders ------------------------------------------------------------------------


def test_the_released_order_computes_what_castling_does(layers):
    castling = layers.LAYERS["castling"]().eval()
    released = layers.LAYERS["released"]().eval()
    released.load_state_dict(castling.state_dict())
    x, grid = layers.tokens((5, 7))
    assert_close(released(x, grid), castling(x, grid), atol=1e-5, rtol=0)


def test_projections_keep_tokens_apart(layers):
    projections = layers.LAYERS["projections"]().eval()
    x, grid = layers.tokens((5, 7))
    before = projections(x, grid)
    x[0, 3] += 1.0
    changed = (projections(x, grid) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [3]


def test_no_mixing_takes_every_attention_out(load_benchmark):
    script = load_benchmark("backbones")
    model = script.vit_without_mixing()
    kinds = {type(block.attn.mixer).__name__ for block in model.layers}
    assert kinds == {"Values"}


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ("retinanet_castling_levit_256_coco", "fp32"),
        ("rtmdet_castling_levit_256_coco", "int8"),
    ],
)
def test_detectors_have_as_many_boxes_as_they_may_return(
    load_benchmark, config, precision
):
    script = load_benchmark("detectors")
    torch.manual_seed(0)
    model = script.detector(config, precision)()
    (data,) = script.picture((256, 320))
    with torch.inference_mode():
        (sample,) = model.test_step(data)
    assert len(sample.pred_instances) == model.test_cfg.max_per_img
    kinds = {type(module).__name__ for module in model.backbone.modules()}
    assert ("QuantizedLinear" in kinds) == (precision == "int8")


def test_reading_runs_the_pipeline_of_the_config(load_benchmark):
    script = load_benchmark("detectors")
    assert script.reading_of(script.LIGHT_DETECTORS["RTMDet-s"], (320, 320)) > 0


# -- measuring -------------------------------------------------------------------------


@pytest.mark.long
def test_a_size_is_measured(layers, capsys, warm_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(warm_python))  # measures memory
    benchmark = dataclasses.replace(
        layers.BENCHMARK, repeats={(4, 4): 3}, extra=lambda device: {"more": 1}
    )
    result = benchmark.measure(["castling", "softmax"], "cpu")
    assert [cell["contender"] for cell in result["cells"]] == ["castling", "softmax"]
    for cell in result["cells"]:
        seconds = cell["seconds"]
        assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert cell["memory"] >= 0 and cell["macs"] > 16 * 4 * 384 * 384
    assert result["more"] == 1 and result["environment"]["torch"]
    assert "| 4x4 | castling |" in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on_after_what_it_had_measured(
    layers, monkeypatch, tmp_path
):
    killed = []

    def extra(device):
        if not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return {"more": 1}

    benchmark = dataclasses.replace(
        layers.BENCHMARK, repeats={(4, 4): 1, (5, 5): 1}, extra=extra
    )
    monkeypatch.setattr(type(benchmark), "_memory_in_fresh_process", lambda *_: 7)
    noted = tmp_path / "cpu.unfinished"
    with pytest.raises(KeyboardInterrupt):
        benchmark.measure(["castling"], "cpu", noted)
    before = json.loads(noted.read_text())["cells"]
    assert [cell["size"] for cell in before] == [[4, 4], [5, 5]]
    monkeypatch.setitem(
        type(benchmark).measure.__globals__, "paired_seconds", lambda *_: 1 / 0
    )
    result = benchmark.measure(["castling"], "cpu", noted)
    assert [cell["seconds"] for cell in result["cells"]] == [
        c["seconds"] for c in before
    ]
    assert result["more"] == 1 and result["cells"][0]["memory"] == 7
    changed = json.loads(noted.read_text())
    changed["environment"]["torch"] = "0.1"
    noted.write_text(json.dumps(changed))
    with pytest.raises(ZeroDivisionError):  # of another version: measured anew
        benchmark.measure(["castling"], "cpu", noted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "castlin"], "['castlin'] are not contenders: choose among"),
        (["--only", "castling"], ".json holds complete results: name another"),
        (
            ["--device", "cuda:77"],
            "--device cuda:77: torch finds no such device here (",
        ),
        (["--device", "abacus"], "--device abacus: torch finds no such device here ("),
    ],
)
def test_what_cannot_be_stored_is_not_measured(
    layers, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(sys, "argv", ["attention.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        layers.BENCHMARK.main("")
    assert message in capsys.readouterr().err


def test_a_target_is_reached_up_to_its_limit(layers):
    target = layers.Target
    assert target("time", 0.8, 0.8).reached and not target("time", 0.81, 0.8).reached
    assert target("speed", 5.0, 5, least=True).reached
    assert not target("speed", 4.9, 5, least=True).reached
    assert "**no**" in str(target("speed", 4.9, 5, least=True))


def test_targets_compare_the_right_contenders(layers):
    seconds = {"castling": 1.0, "released": 2.0, "softmax": 7.0}
    seconds.update({"landmarks": 5.0, "4x4 landmarks": 3.0})
    cells = [
        dict(contender=name, size=list(grid), seconds=dict(median=value))
        for name, value in seconds.items()
        for grid in layers.GRIDS
    ]
    found = [target.measured for target in layers.targets(dict(cells=cells))]
    assert found == pytest.approx([0.5, 7.0, 1 / 7, 5.0, 3.0, 0.0])


# -- the report ------------------------------------------------------------------------


def write(folder, results, kind="avx512"):
    paths = []
    for name, result in results.items():
        paths.append(folder / name / f"{kind}.json")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text(json.dumps(result))
    return paths


def test_the_page_is_generated_from_the_stored_results(report, stored):
    assert tuple(report.SCRIPTS) == tuple(report.SECTIONS) == NAMES
    assert report.PAGE.read_text() == report.page(stored)


def test_the_page_names_what_is_not_stored(report, of_one_kind):
    name, *others = of_one_kind
    text = report.page({"avx512": {name: of_one_kind[name]}})
    for other in others:
        command = report.SCRIPTS[other].BENCHMARK.command
        assert f"`{command}` (avx512)" in text.split("## Targets")[0]
        assert report.SECTIONS[other][1](of_one_kind[other]) not in text
    assert report.SECTIONS[name][1](of_one_kind[name]) in text


def test_machines_of_two_kinds_are_told_apart(report, of_one_kind, tmp_path):
    results = {name: of_one_kind[name] for name in ("attention", "backbones")}
    slower = copy.deepcopy(results)
    for result in slower.values():
        result["environment"] |= dict(device="An Old CPU with AVX2", threads=4)
        for cell in result["cells"]:
            cell["seconds"] = {k: 3 * v for k, v in cell["seconds"].items()}
    kinds = {"avx512": results, "avx2": {"attention": slower["attention"]}}
    paths = [p for kind, found in kinds.items() for p in write(tmp_path, found, kind)]
    found = report.read(paths)
    text = report.page(found)
    assert "| avx2 | An Old CPU with AVX2 | 4 |" in text
    assert "`python benchmarks/backbones.py` (avx2)" in text
    layers = text.split("## Attention layers")[1].split("## Backbones")[0]
    ours, other = layers.split("### On avx512")[1].split("### On avx2")
    for part, result in ((ours, results), (other, slower)):
        assert report.table(result["attention"]) in part
    assert report.table(results["attention"]) not in other
    (claim,) = [x for x in text.splitlines() if x.startswith("| 4,200 tokens: speed")]
    first, second = (cell.strip() for cell in claim.split("|")[2:4])
    assert first == second != "-"  # a ratio, of each machine's own
    assert "| ViT-S: speed over its softmax twin's, at least 2.6 | 2.96 | - |" in text
    readme = report.readme_with(
        {kind: r["backbones"] for kind, r in [("avx512", results), ("avx2", slower)]},
        report.README.read_text(),
    )
    assert "| ViT-S | avx2 | 9,118 | 3,084 | 3.0 |" in readme
    assert "avx2: 4 CPU threads, An Old CPU with AVX2, torch" in readme


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", "Abacus with AVX512"), ("threads", 64)],
)
def test_results_of_another_machine_are_not_mixed_in(
    report, of_one_kind, tmp_path, key, value
):
    results = copy.deepcopy(of_one_kind)
    results["backbones"]["environment"][key] = value
    message = rf"avx512\.json was measured with {key} {value!r}, attention/avx512\.json"
    with pytest.raises(ValueError, match=message):
        report.read(write(tmp_path, results))


def test_versions_stand_beside_the_scripts_that_met_them(report, of_one_kind, tmp_path):
    results = copy.deepcopy(of_one_kind)
    for name in ("backbones", "runtimes"):
        results[name]["environment"]["torch"] = "1.2.3"
    text = report.page(report.read(write(tmp_path, results)))
    (row,) = [line for line in text.splitlines() if "| 1.2.3 |" in line]
    assert row.startswith("| avx512 |") and row.endswith("| backbones, runtimes |")


def test_a_result_under_another_kind_s_name_is_refused(report, of_one_kind, tmp_path):
    paths = write(tmp_path, {"attention": of_one_kind["attention"]}, "amx")
    with pytest.raises(ValueError, match=r"amx\.json was measured on .*name it avx512"):
        report.read(paths)


def test_an_incomplete_result_is_refused(report, of_one_kind, tmp_path):
    results = copy.deepcopy(of_one_kind)
    results["backbones"]["cells"].pop()
    with pytest.raises(ValueError, match=r"lacks .*EfficientViT-B2.* without --only"):
        report.read(write(tmp_path, results))


def test_what_the_measuring_machine_lacked_is_not_demanded(
    report, of_one_kind, tmp_path
):
    result = copy.deepcopy(of_one_kind["precision"])
    gone = {cell["contender"] for cell in result["cells"]} - {"softmax fp32", "fp32"}
    cells = [cell for cell in result["cells"] if cell["contender"] not in gone]
    (path,) = write(tmp_path, {"precision": {**result, "cells": cells}})
    here = {p for p, why in report.SCRIPTS["precision"].supported().items() if not why}
    if gone & here:
        with pytest.raises(ValueError, match="lacks"):
            report.read([path])
    lacking = dict.fromkeys([*gone, *result["lacking"]], "no instructions")
    write(tmp_path, {"precision": {**result, "cells": cells, "lacking": lacking}})
    assert list(report.read([path])["avx512"]) == ["precision"]


def test_unknown_and_missing_results_are_refused(report, tmp_path):
    with pytest.raises(ValueError, match=r"avx2\.json is not the result of a known"):
        report.read([tmp_path / "speed" / "avx2.json"])
    with pytest.raises(ValueError, match=r"run python benchmarks/attention\.py"):
        report.read([tmp_path / "attention" / "avx2.json"])


def test_auto_is_judged_by_the_limit_of_its_machine(report, of_one_kind):
    result = copy.deepcopy(of_one_kind["precision"])
    targets = report.SCRIPTS["precision"].targets
    for device, limits in {"AMX": [11.0], "AVX512": [6.0], "AVX2": []}.items():
        result["environment"]["device"] = f"x with {device}"
        found = [t for t in targets(result) if "in what auto takes" in t.claim]
        assert [target.limit for target in found] == limits
        for target in found:
            assert target.measured == pytest.approx(3248.3 / 546.9, rel=1e-3)


def test_pictures_are_drawn(report, of_one_kind, tmp_path):
    figures = report.speed_figures
    for draw in (figures.plot_resolution, figures.plot_macs):
        draw(of_one_kind["backbones"], tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "x.png").unlink()
