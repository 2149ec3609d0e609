"""The study's page is that of its runs; intervals are Student's, and paired."""

import json

import pytest


@pytest.fixture(scope="module")
def study(load_benchmark):
    return load_benchmark("study")


def test_intervals_are_students(study):
    found = study.intervals.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.count == 3
    assert found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert found.text() == "2.0 ± 2.5"
    assert study.intervals.interval([9.0]).text(2) == "9.00"  # one seed has none


def test_differences_are_paired_by_seed(study):
    one, other = {0: 10.0, 1: 20.0, 2: 31.0, 9: 99.0}, {2: 30.0, 1: 19.0, 0: 9.0}
    found = study.intervals.paired(one, other)
    assert (found.mean, found.half, found.count) == (1.0, 0.0, 3)
    assert study.intervals.paired(one, {5: 1.0}) is None


def test_page_and_readme_show_the_stored_runs(study):
    assert study.PAGE.read_text() == study.page()
    readme = study.README.read_text()
    table = study.readme_table()
    assert study.marked.replace_between(readme, study.BEGIN, study.END, table) == readme


def test_tables_pair_the_rows_and_tell_what_is_left(study, tmp_path, monkeypatch):
    folder = tmp_path / "fashion"
    folder.mkdir()
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study.fashion, "STORED", folder)
    assert study.scratch_table() == ["No run is stored yet."]
    accuracy = {
        "control": (92.0, 93.0),
        "control-mlp": (95.0,),
        "angular": (91.0, 91.0),
    }
    for row, values in accuracy.items():
        for seed, value in enumerate(values):
            run = dict(
                title=row,
                accuracy={"1.0": value, "1.5": 80.0, "2.0": 70.0},
                before=value + 0.5,
                cpu_seconds=1800.0,
                macs=2e6,
                curve=[50.0, value],
                settings=dict(rate=1e-3, amp=True),
                environment=dict(device="CPU", torch="2"),
            )
            (folder / f"train-{row}-{seed}.json").write_text(json.dumps(run))
    lines = study.scratch_table()
    assert "| control | 2 | 92.50 ± 6.35 |" in lines[2]
    assert "| angular | 2 | 91.00 ± 0.00 |  | -1.50 ± 6.35 |" in lines[3]
    assert "by more than 0.50 points" in lines[-1]
    assert "| angular | 2 | 91.00 ± 0.00 |" in study.readme_table()
    scratch = study.parts()[1]
    assert scratch.state() == "5 of 30 runs, 2.5 core-hours; about 12.5 are left"
    study.draw_curves(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
