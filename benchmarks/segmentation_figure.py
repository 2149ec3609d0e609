"""Images beside their true and their predicted classes, with a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from mmcastling.show.figures import draw_rows, save_figure


@dataclass(frozen=True)
class SegmentationLegend:
    """Names and colours of classes, by id.

    Attributes:
        classes: Names.
        palette: ``(R, G, B)`` in 0 to 255 of each.
    """

    classes: Sequence[str]
    palette: Sequence[Sequence[int]]

    def paint(self, labels: np.ndarray) -> np.ndarray:
        """Colours ``(H, W, 3)`` of class ids ``(H, W)``; no class is black."""
        colours = np.zeros((256, 3), np.uint8)
        colours[: len(self.palette)] = self.palette
        return colours[labels]


def plot_segmentation(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    legend: SegmentationLegend,
    path: str | Path,
) -> None:
    """Draw each image beside its true and its predicted classes.

    Args:
        images: RGB images ``(H, W, 3)``.
        truths: Class ids ``(H, W)`` in 0 to 255, one map per image; ids without a
            class are void.
        predictions: Class ids ``(H, W)``, one map per image.
        legend: Names and colours of the classes.
        path: PNG file to write.
    """
    titles = ("image", "ground truth, void black", "prediction")
    rows = [
        (image, legend.paint(truth), legend.paint(prediction))
        for image, truth, prediction in zip(images, truths, predictions, strict=True)
    ]
    figure = draw_rows(rows, titles)
    figure.set_figheight(figure.get_figheight() + 0.9)
    handles = [
        Patch(facecolor=np.divide(colour, 255), label=name)
        for name, colour in zip(legend.classes, legend.palette, strict=True)
    ]
    columns = -(-len(handles) // 2)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False
    )
    save_figure(figure, path, dpi=110)
