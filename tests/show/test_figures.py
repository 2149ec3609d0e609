"""Figures: what their colours mean, and that files are written."""

import numpy as np
from PIL import Image

from mmcastling.show.figures import draw_rows, paint_masks, save_figure

GREY = np.full((30, 40, 3), 100, np.uint8)


def test_objects_are_tinted_and_outlined_and_nothing_else_is():
    masks = np.zeros((2, 30, 40), bool)
    masks[0, 5:15, 5:15] = masks[1, 20:28, 20:30] = True
    painted = paint_masks(GREY, masks)
    assert (painted[~masks.any(0)] == 100).all() and (GREY == 100).all()
    outline, inside = painted[5, 5].astype(int), painted[10, 10].astype(int)
    assert np.ptp(outline) > np.ptp(inside) > 0
    assert (painted[20, 20] != painted[5, 5]).any()  # objects differ in colour
    assert (paint_masks(GREY, masks[:0]) == GREY).all()


def test_pictures_stand_in_rows_under_their_titles(tmp_path):
    rows = [[GREY, GREY + 50], [GREY + 100, GREY + 150]]
    path = tmp_path / "figure.png"
    figure = draw_rows(rows, ("image", "prediction"))
    assert [axes.get_title() for axes in figure.axes[:2]] == ["image", "prediction"]
    save_figure(figure, path, dpi=50)
    with Image.open(path) as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    height, width = pixels.shape[:2]
    for level, row, column in ((100, 0, 0), (150, 0, 1), (200, 1, 0), (250, 1, 1)):
        y, x = np.nonzero((pixels == level).all(2))
        assert (y.mean() > height / 2, x.mean() > width / 2) == (row, column)
