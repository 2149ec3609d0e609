"""benchmarks/detector_training.py: its stored result, its page, and fair contenders."""

import json

import pytest
import torch

from mmcastling.attention.masked_softmax import mask_state, masked_softmax_with_state


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("detector_training")


@pytest.fixture(scope="module")
def stored(benchmark):
    return json.loads(benchmark.STORED.read_text())


def test_page_is_generated_from_the_stored_result(benchmark, stored):
    assert benchmark.PAGE.read_text() == benchmark.page(stored)


def test_every_contender_trained_with_its_branch_on_or_off(benchmark, stored):
    rows = {row["name"]: row for row in stored["rows"]}
    assert set(rows) == set(benchmark.CONTENDERS)
    assert all(len(row["losses"]) == 5 for row in rows.values())
    for name in ("naive", "ours"):
        assert rows[name]["attentions_with_branch"] == 12
        assert min(rows[name]["mask_density"]) > 0
    assert max(rows["off"]["mask_density"]) == 0


def test_naive_and_ours_trained_the_same_network(stored):
    naive, ours = ({r["name"]: r for r in stored["rows"]}[n] for n in ("naive", "ours"))
    assert ours["losses"][0] == pytest.approx(naive["losses"][0], rel=1e-4)
    assert ours["mask_density"][0] == pytest.approx(naive["mask_density"][0], rel=1e-3)


def test_running_means_are_taken_apart(benchmark):
    assert benchmark.iteration_seconds([4.0, 3.0, 4.0]) == [4.0, 2.0, 6.0]


@pytest.mark.parametrize("threshold", [0.1, "1/N"])
def test_naive_contender_computes_what_ours_does(benchmark, threshold):
    q, k, v = torch.randn(3, 1, 2, 9, 4, generator=torch.manual_seed(0)).unbind(0)
    state = mask_state(threshold, 0.5)
    naive = benchmark._naive_with_state(q, k, v, state=state)
    ours = masked_softmax_with_state(q, k, v, state=state)
    assert 0 < ours[1] < 1
    torch.testing.assert_close(naive, ours)
