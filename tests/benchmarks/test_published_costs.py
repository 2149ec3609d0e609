"""benchmarks/published_costs.py, its stored result and the page made from it."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("published_costs")


@pytest.fixture(scope="module")
def stored(benchmark):
    return json.loads(benchmark.STORED.read_text())


def test_page_is_generated_from_the_stored_result(benchmark, stored):
    assert benchmark.PAGE.read_text() == benchmark.page(stored)


def test_stored_result_meets_the_published_costs(benchmark, stored):
    assert benchmark.failures(stored["rows"]) == []
    assert [row["model"] for row in stored["rows"]] == [
        row.model for row in benchmark.TABLE
    ]
    assert [r["model"] for r in stored["rows"] if not r["must_hold"]] == ["MViTv2-S"]


def test_softmax_originals_agree_with_the_published_costs(stored):
    """The counting itself is checked on models whose structure is known."""
    for row in stored["rows"]:
        assert abs(row["softmax_deviation"]) <= 0.01, row["model"]


@pytest.mark.parametrize("index", [0, 2, 6], ids=["DeiT-T", "LeViT-128", "MViTv2-T"])
@pytest.mark.long
def test_counting_again_gives_the_stored_numbers(benchmark, stored, index):
    assert benchmark.measure(benchmark.TABLE[index]) == stored["rows"][index]


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, 0), ({"macs": 1.02}, 1), ({"macs": 1.02, "must_hold": False}, 0)],
    ids=["as stored", "off", "off but not held to it"],
)
def test_exit_status_tells_a_row_that_is_off(
    benchmark, stored, monkeypatch, tmp_path, capsys, change, status
):
    row = dict(stored["rows"][1])
    row["must_hold"] = change.get("must_hold", True)
    row["deviation"] += change.get("macs", 1.0) - 1.0
    monkeypatch.setattr(benchmark, "TABLE", [None])
    monkeypatch.setattr(benchmark, "measure", lambda _: row)
    out = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["published_costs.py", "--json", str(out)])
    assert benchmark.main() == status
    captured = capsys.readouterr()
    assert ("DeiT-B" in captured.err) == bool(status)
    assert "Castling-DeiT-B" in captured.out
    assert json.loads(out.read_text())["rows"] == [row]


def test_docs_option_writes_the_page_only(benchmark, stored, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(benchmark, "measure", None)
    monkeypatch.setattr(sys, "argv", ["published_costs.py", "--docs"])
    assert benchmark.main() == 0
    assert (tmp_path / "page.md").read_text() == benchmark.page(stored)
