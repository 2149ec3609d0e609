"""benchmarks/auxiliary_branch.py: its stored result, its page, and fair contenders."""

import json

import pytest
import torch


@pytest.fixture
def branch(load_benchmark):
    return load_benchmark("auxiliary_branch")


def test_page_is_generated_from_the_stored_result(branch):
    stored = json.loads(branch.STORED.read_text())
    assert branch.PAGE.read_text() == branch.page(stored)


def test_every_cell_is_stored(branch):
    cells = json.loads(branch.STORED.read_text())["cells"]
    keys = [(c["tokens"], c["sharpness"], c["threshold"]) for c in cells]
    assert keys == [
        (tokens, sharpness, threshold)
        for tokens in branch.TOKENS
        for sharpness in branch.SHARPNESS
        for threshold in branch.THRESHOLDS
    ]
    for cell in cells:
        assert set(cell["seconds"]) == set(branch.contenders(cell["tokens"]))
        assert cell["density"] <= cell["active_rows"]
        assert cell["density"] * cell["tokens"] <= 1 / cell["threshold"]


def test_a_cell_is_measured(branch, monkeypatch):
    monkeypatch.setitem(branch.REPEATS, 50, 3)
    memory = []
    monkeypatch.setattr(
        branch, "memory_in_fresh_process", lambda *cell: memory.append(cell) or 1
    )
    cell = branch.measure_cell(50, 0.02, 3.0, "cpu")
    assert set(cell["seconds"]) == {"naive", "ours", "fused"}
    assert all(v["low"] <= v["median"] <= v["high"] for v in cell["seconds"].values())
    assert [entry[0] for entry in memory] == ["naive", "ours", "fused"]
    assert 0 < cell["density"] < cell["active_rows"] <= 1


def test_contenders_are_given_the_same_work(branch):
    passes = [branch.make_pass(n, 40, 0.0, 1.0, "cpu") for n in branch.CONTENDERS]
    first, *others = [run() for run in passes]
    for other in others:  # at threshold 0 all three are softmax attention
        torch.testing.assert_close(other, first, atol=1e-5, rtol=1e-4)


def test_a_missed_target_is_told(branch):
    result = json.loads(branch.STORED.read_text())
    reached = {claim: ok for claim, _, ok in branch.targets(result)}
    for cell in result["cells"]:
        cell["memory"]["ours"] = cell["tokens"] ** 2 * 100
        cell["seconds"]["ours"] = dict(median=99.0)
    missed = {claim: ok for claim, _, ok in branch.targets(result)}
    assert reached.keys() == missed.keys() and not any(missed.values())
