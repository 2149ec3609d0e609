"""The parts of pages that scripts write: between marks, of the stored results."""

import pytest


@pytest.mark.parametrize("script", ["align_dinov2", "dinov2_finetuned"])
def test_the_page_of_alignment_is_that_of_the_stored_results(
    load_benchmark, script, monkeypatch, tmp_path
):
    benchmark = load_benchmark(script)
    page = tmp_path / "align.md"
    page.write_text(text := benchmark.PAGE.read_text())
    monkeypatch.setattr(benchmark, "PAGE", page)
    benchmark.write_page()
    assert page.read_text() == text


@pytest.mark.parametrize("text", ["", "<a>old", "old</a>", "<a>1</a><a>2</a>"])
def test_a_page_without_its_marks_stays_as_it_is(load_benchmark, text):
    replace = load_benchmark("marked").replace_between
    assert replace("x<a>old</a>y", "<a>", "</a>", "new") == "x<a>new</a>y"
    with pytest.raises(ValueError, match=r"the page has '</?a>' [02] times"):
        replace(text, "<a>", "</a>", "new")
