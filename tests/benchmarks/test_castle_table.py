"""benchmarks/castle_table.py, its stored result and the table made from it."""

import json

import pytest

timm = pytest.importorskip("timm", reason="pip install -r requirements-dev.txt")


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("castle_table")


@pytest.fixture(scope="module")
def stored(benchmark):
    return json.loads(benchmark.STORED.read_text())


def test_the_page_is_that_of_the_stored_result(benchmark, stored):
    page = benchmark.PAGE.read_text()
    assert page == benchmark.page_with(stored, page)


def test_most_of_what_people_run_is_castled_and_nothing_is_unknown(benchmark, stored):
    models = stored["models"]
    assert sum(models[name]["castled"] > 0 for name in benchmark.NAMES) >= 38
    for name, row in models.items():
        assert "no adapter" not in row.get("left_alone", {}), name


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_a_model_tried_again_gives_the_stored_row(benchmark, stored, name):
    if stored["timm"] != timm.__version__:
        pytest.skip(f"stored of timm {stored['timm']}")
    assert benchmark.trial(name) == stored["models"][name]


@pytest.mark.long
@pytest.mark.parametrize("name", ["cait_xxs24_224", "pvt_v2_b0", "halonet26t"])
def test_what_is_left_alone_has_the_stored_reason(benchmark, stored, name):
    if stored["timm"] != timm.__version__:
        pytest.skip(f"stored of timm {stored['timm']}")
    assert benchmark.trial(name) == stored["models"][name]
