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


def test_contenders_with_the_branch_trained_the_same_network(stored):
    rows = {row["name"]: row for row in stored["rows"]}
    both = [rows[name] for name in ("naive", "ours") if "failed" not in rows[name]]
    for row in both:
        assert row["attentions_with_branch"] == 12
        assert row["losses"][0] == pytest.approx(both[0]["losses"][0], rel=1e-4)
        assert row["mask_density"][0] == pytest.approx(
            both[0]["mask_density"][0], rel=1e-3
        )


def test_seconds_are_recovered_from_running_means(benchmark):
    assert benchmark.iteration_seconds([4.0, 3.0, 4.0]) == pytest.approx(
        [4.0, 2.0, 6.0]
    )


@pytest.mark.parametrize("threshold", [0.1, "1/N"])
def test_naive_contender_computes_what_ours_does(benchmark, threshold):
    q, k, v = torch.randn(3, 1, 2, 9, 4, generator=torch.manual_seed(0)).unbind(0)
    state = mask_state(threshold, 0.5)
    naive = benchmark._naive_with_state(q, k, v, state=state)
    ours = masked_softmax_with_state(q, k, v, state=state)
    assert 0 < ours[1] < 1
    torch.testing.assert_close(naive, ours)
