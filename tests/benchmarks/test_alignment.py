"""The benchmarks of alignment: their page is that of the stored runs."""

import pytest


@pytest.mark.parametrize("name", ["align_dinov2", "align_detector", "dinov2_finetuned"])
def test_the_page_is_that_of_the_stored_runs(
    load_benchmark, tmp_path, monkeypatch, name
):
    benchmark = load_benchmark(name)
    page = benchmark.PAGE.read_text()
    copied = tmp_path / "page.md"
    copied.write_text(page)
    monkeypatch.setattr(benchmark, "PAGE", copied)
    benchmark.write_page()
    assert copied.read_text() == page
    monkeypatch.setattr(benchmark, "STORED", tmp_path)  # where nothing is stored
    benchmark.write_page()
    assert copied.read_text() != page or "No run" in page
