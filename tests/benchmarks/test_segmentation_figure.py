"""The segmentation figure: what its colours mean, and that a file is written."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def module(load_benchmark):
    return load_benchmark("segmentation_figure")


@pytest.fixture(scope="module")
def legend(module):
    return module.SegmentationLegend(["sky", "road"], [(0, 0, 255), (90, 90, 90)])


def test_classes_have_their_colours_and_void_is_black(legend):
    painted = legend.paint(np.array([[0, 1], [2, 255]], np.uint8))
    assert painted.tolist() == [[[0, 0, 255], [90] * 3], [[0] * 3, [0] * 3]]


def test_a_segmentation_is_drawn_beside_its_truth(module, legend, tmp_path):
    image = np.full((30, 40, 3), 200, np.uint8)
    truth = np.full((30, 40), 255, np.uint8)
    predicted = np.ones((30, 40), np.int64)
    path = tmp_path / "figure.png"
    module.plot_segmentation([image], [truth], [predicted], legend, path)
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    for colour in ((200,) * 3, (0,) * 3, (90,) * 3):
        assert (pixels == colour).all(1).mean() > 0.05
