"""The benchmark of segmentation: its figures, its baselines, and all of it, small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("camvid")


def test_scores_are_those_of_the_definition(benchmark):
    truth = np.array([[0, 0, 0, 1], [1, 1, 9, 9]], np.uint8)
    predicted = np.array([[0, 0, 1, 1], [1, 0, 0, 1]])
    matrix = benchmark.confusion(predicted, truth, 3)
    assert matrix.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    result = benchmark.scores(matrix, ["a", "b", "c"])
    assert result["iou"] == pytest.approx(dict(a=50.0, b=50.0))  # c is nowhere
    assert result["miou"] == pytest.approx(50.0)
    assert result["accuracy"] == pytest.approx(400 / 6)


@pytest.fixture(scope="module")
def quadrants():
    """Colours that tell the class, of which a fourth is void in spite of its colour."""
    rng = np.random.default_rng(0)
    label = np.zeros((40, 40), np.uint8)
    label[20:], label[20:, 20:] = 1, 2
    image = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)[label]
    image += rng.integers(0, 50, image.shape, dtype=np.uint8)
    label[:20, :20] = 11
    return image, label


def test_the_colour_classifier_knows_colours_and_nothing_else(
    benchmark, quadrants, monkeypatch
):
    monkeypatch.setattr(benchmark, "STEPS", 60)
    image, label = quadrants
    model = benchmark.colour_classifier([quadrants], 3)
    again = benchmark.colour_classifier([quadrants], 3)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    found = benchmark.classify_colours(model, image)
    assert (found == label)[label < 11].all() and set(np.unique(found)) == {0, 1, 2}
    order = np.random.default_rng(1).permutation(40 * 40)
    mixed = image.reshape(-1, 3)[order].reshape(image.shape)
    expected = found.reshape(-1)[order].reshape(label.shape)
    assert (benchmark.classify_colours(model, mixed) == expected).all()


def test_the_constant_is_the_class_of_most_training_pixels(
    benchmark, quadrants, monkeypatch
):
    monkeypatch.setattr(benchmark, "STEPS", 60)
    image, label = quadrants
    other = np.where(label == 1, 2, label).astype(np.uint8)  # in validation alone
    # 400 pixels of each class are left in training; of equals the first is taken.
    classes = ["a", "b", "c"]
    result = benchmark.baselines([(image, label)], [(image, other)], classes, [1.0] * 3)
    assert result["constant"]["class"] == "a"
    assert result["constant"]["accuracy"] == pytest.approx(100 * 400 / 1200)
    assert result["constant"]["iou"]["c"] == 0
    assert result["colour"]["iou"]["a"] == 100


@pytest.mark.slow
@pytest.mark.long
def test_it_trains_evaluates_compares_and_stores(
    benchmark, segmentor_config, scenes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark, "STEPS", 30)
    out, picture = tmp_path / "result.json", tmp_path / "picture.png"
    options = ["--config", segmentor_config, "--data-root", scenes, "--json", out]
    options += ["--work-dir", tmp_path / "work", "--picture", picture]
    monkeypatch.setattr(sys, "argv", ["camvid.py", *map(str, options)])
    benchmark.main()
    result = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text() and str(scenes) not in out.read_text()
    assert result["frames"] == dict(train=4, val=4)
    assert result["image_size"] == [90, 120]
    seconds = result["training"]["seconds"]
    assert seconds > 0 and 0 < result["training"]["cpu_seconds"] < 4 * seconds
    assert result["training"]["iterations"] == 4
    assert sum(result["val_share"].values()) == pytest.approx(100)
    assert set(result["scores"]) == set(benchmark.ROWS)
    for row in result["scores"].values():
        assert row["miou"] == pytest.approx(np.mean(list(row["iou"].values())))
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 900
    assert "| bicyclist |" in capsys.readouterr().out

    # What has been trained is not trained again.
    (log,) = (tmp_path / "work").glob("2*/*.log")
    checkpoint, facts = benchmark.train(segmentor_config, scenes, tmp_path / "work")
    assert list((tmp_path / "work").glob("2*/*.log")) == [log]
    assert checkpoint.name == "iter_4.pth"
    assert facts["seconds"] == result["training"]["seconds"]


def test_the_page_holds_the_stored_figures(benchmark):
    result = json.loads((ROOT / "benchmarks/results/camvid.json").read_text())
    page = (ROOT / "docs/segmentation.md").read_text()
    assert benchmark.page_with(result, page) == page
    network, others = result["scores"]["network"], ("constant", "colour")
    assert all(network["miou"] > 1.5 * result["scores"][k]["miou"] for k in others)
    assert result["training"]["seconds"] < 25 * 60
