"""The benchmark of castling and distillation, on pictures a ViT learns in no time."""

import json
import sys

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("castle_and_distil")


@pytest.mark.slow
@pytest.mark.long
def test_it_compares_the_two_finetunings_and_stores_the_figures(
    benchmark, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "result.json"
    options = ["--data-root", data, "--json", out, "--train-images", 512]
    options += ["--test-images", 128, "--epochs", 2, "--finetune-epochs", 2]
    options += ["--seeds", 0, 1, "--lr", 5e-3, "--finetune-lr", 5e-3]
    monkeypatch.setattr(sys, "argv", ["castle_and_distil.py", *map(str, options)])
    benchmark.main()
    result = json.loads(out.read_text())
    assert "--train-images 512" in result["command"]
    assert str(tmp_path) not in result["command"] and str(data) not in out.read_text()
    assert set(result["runs"]) == {"0", "1"}
    for run in result["runs"].values():
        for name in ("softmax", "softmax_finetuned", "labels_pruned", "taught_pruned"):
            assert run[name] > 90
        assert run["castled_pruned"] < run["labels_pruned"]
        assert run["labels_before_pruning"] == run["labels_pruned"]
        assert run["taught_before_pruning"] == run["taught_pruned"]
        gain = run["taught_pruned"] - run["labels_pruned"]
        assert run["taught_minus_labels"] == gain
    means = result["summary"]["softmax"]
    figures = [run["softmax"] for run in result["runs"].values()]
    assert means["mean"] == pytest.approx(np.mean(figures))
    assert means["std"] == pytest.approx(np.std(figures, ddof=1))
    table = capsys.readouterr().out
    assert f"| {means['mean']:.2f} |" in table and "teacher's gain" in table
    assert not out.with_suffix(".partial").exists()


def test_table_is_written_between_the_marks_of_the_page(benchmark):
    row = dict(mean=70.0, std=0.5)
    result = dict(
        command=benchmark.command(["--seeds", "0", "--data-root", "somewhere"]),
        settings=dict(
            test_images=10_000,
            train_images=12_000,
            epochs=5,
            finetune_epochs=2,
            mode="soft",
            alpha=0.5,
            temperature=2.0,
        ),
        summary=dict.fromkeys(benchmark.ROWS, row),
        runs={"0": {}},
        seconds=120.0,
        environment=dict(threads=2, torch="2.15.0"),
    )
    assert result["command"].endswith("castle_and_distil.py --seeds 0")
    text = benchmark.PAGE.read_text()
    page = benchmark.page_with(result, text)
    assert page.count("| 70.00 | 0.50 |") == len(benchmark.ROWS)
    assert benchmark.page_with(result, page) == page
    assert page.startswith(text.partition(benchmark.BEGIN)[0])


def test_the_page_shows_the_stored_run(benchmark):
    result = json.loads(benchmark.STORED.read_text())
    assert result["command"] == "python benchmarks/castle_and_distil.py"
    assert set(result["runs"]) == {"0", "1", "2"}
    text = benchmark.PAGE.read_text()
    assert benchmark.page_with(result, text) == text


def test_training_sees_the_same_batches_taught_or_not(benchmark, data):
    import torch

    def first_batch(seed):
        generator = torch.Generator().manual_seed(seed)
        pictures = benchmark.Pictures(
            data, benchmark.FashionMNIST.train_list, 64, generator
        )
        return pictures.__getitems__([0, 1, 2])[0]

    assert torch.equal(first_batch(0), first_batch(0))
    assert not torch.equal(first_batch(0), first_batch(1))


def test_missing_data_says_how_to_get_it(benchmark, tmp_path):
    with pytest.raises(benchmark.ConfigError, match="install Debian's dataset-fashion"):
        benchmark.find_data(tmp_path, download=False)


def test_fewer_images_than_asked_for_are_an_error(benchmark, data):
    with pytest.raises(benchmark.ConfigError, match="holds 128 images, not 10000"):
        benchmark.Pictures(data, benchmark.FashionMNIST.test_list, 10_000)
