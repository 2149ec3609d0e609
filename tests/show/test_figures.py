"""Figures: what their colours mean, and that files are written."""

import numpy as np
from PIL import Image

from mmcastling.show.figures import SegmentationLegend, plot_segmentation

LEGEND = SegmentationLegend(["sky", "road"], [(0, 0, 255), (90, 90, 90)])


def test_classes_have_their_colours_and_void_is_black():
    painted = LEGEND.paint(np.array([[0, 1], [2, 255]], np.uint8))
    assert painted.tolist() == [[[0, 0, 255], [90] * 3], [[0] * 3, [0] * 3]]


def test_a_segmentation_is_drawn_beside_its_truth(tmp_path):
    image = np.full((30, 40, 3), 200, np.uint8)
    truth = np.full((30, 40), 255, np.uint8)
    predicted = np.ones((30, 40), np.int64)
    path = tmp_path / "figure.png"
    plot_segmentation([image], [truth], [predicted], LEGEND, path)
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    for colour in ((200,) * 3, (0,) * 3, (90,) * 3):
        assert (pixels == colour).all(1).mean() > 0.05
