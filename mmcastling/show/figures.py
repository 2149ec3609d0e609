"""Figures of a training run and of its predictions, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from mmcastling.checkpoint import write_atomically
from mmcastling.show.run_log import MaskHistory


def save_figure(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        CheckpointError: If it cannot be written; a previous file stays as it was.
    """
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def plot_mask_density(
    history: MaskHistory, path: str | Path, metrics: Sequence[str] | None = None
) -> None:
    """Draw density, threshold and metric over training.

    Args:
        history: From :func:`mmcastling.show.run_log.read_mask_history`.
        path: PNG file to write.
        metrics: Names of the metrics to draw. Defaults to None
            (:meth:`MaskHistory.headlines`).

    Raises:
        ValueError: If a metric was not logged.
        CheckpointError: If the file cannot be written.
    """
    names = history.headlines() if metrics is None else list(metrics)
    history.check_metrics(names)
    heights = (3, 2, 2) if names else (3, 2)
    # Figure instead of pyplot: no display, and no global backend to disturb.
    figure = Figure(figsize=(7, 1 + 0.85 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_density(panels[0], history)
    _draw_threshold(panels[1], history)
    for name in names:
        points = history.metrics[name]
        panels[2].plot(*zip(*points, strict=True), marker="o", ms=3.5, label=name)
    if names:
        panels[2].set_ylabel("validation")
        panels[2].set_ylim(bottom=0)  # once all lines are there: it ends autoscaling
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="best")
    panels[0].set_title("The auxiliary softmax masks over training", loc="left")
    panels[-1].set_xlabel("iteration")
    save_figure(figure, path, dpi=130)


def _draw_density(axes: Axes, history: MaskHistory) -> None:
    for name, values in history.groups.items():
        axes.plot(history.steps, values, lw=1, label=f"{name} layers")
    axes.plot(history.steps, history.density, color="black", lw=2, label="all layers")
    # Zero must be visible: linear below the smallest decade, logarithmic above.
    axes.set_yscale("symlog", linthresh=1e-5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("pairs that survive")


def _draw_threshold(axes: Axes, history: MaskHistory) -> None:
    lines = [(history.threshold, "tab:red", "-", "threshold, as a probability")]
    if any(history.threshold_uniform):
        label = "plus this multiple of uniform attention, 1/N"
        lines.append((history.threshold_uniform, "tab:orange", "--", label))
    if any(weight != 1 for weight in history.weight):
        lines.append((history.weight, "tab:blue", "-", "weight of the branch"))
    for values, colour, style, label in lines:
        axes.plot(history.steps, values, color=colour, ls=style, label=label)
    axes.set_ylim(bottom=-0.03)
    axes.set_ylabel("state of the mask")


def draw_rows(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Draw rows of pictures, such as each image beside its truth and its prediction.

    Args:
        rows: RGB pictures ``(H, W, 3)``, as many in each row as there are titles.
        titles: What the columns are.
    """
    height, width = rows[0][0].shape[:2]
    size = (3 * len(titles), 3.1 * height / width * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, pictures in zip(grid, rows, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture)
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    return figure


def paint_masks(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """An RGB image ``(H, W, 3)`` with objects ``(n, H, W)`` tinted and outlined."""
    painted = image.astype(np.float64)
    colours = 255 * matplotlib.colormaps["hsv"](np.linspace(0, 1, 9))[:8, :3]
    for index, mask in enumerate(masks):
        colour = colours[index % len(colours)]
        inner = mask.copy()
        inner[1:-1, 1:-1] &= (
            mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        )
        painted[mask] = 0.65 * painted[mask] + 0.35 * colour
        painted[mask & ~inner] = colour
    return painted.clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class HeatMap:
    """One panel of :func:`plot_attention`.

    Attributes:
        title: What it shows.
        caption: What the colours do not tell; may have several lines.
        weights: ``(H, W)`` weights of a query on the grid of tokens.
        signed: Whether weights may be negative.
    """

    title: str
    caption: str
    weights: np.ndarray
    signed: bool = False


def plot_attention(
    image: np.ndarray,
    maps: Sequence[HeatMap],
    point: tuple[float, float],
    covered: tuple[int, int],
    own: tuple[int, int],
    title: str,
    path: str | Path,
) -> None:
    """Draw an image with a marked point, and weights of that point's token over it.

    Colours span the weights on other tokens; the query's own may lie beyond. Signed
    maps have white at zero.

    Args:
        image: RGB image ``(H, W, 3)``.
        maps: The panels.
        point: ``(x, y)`` in pixels of the image.
        covered: ``(H, W)`` in pixels that a map covers, from the image's upper left
            corner: the image and its padding.
        own: ``(row, column)`` of the query's token.
        title: Headline.
        path: PNG file to write.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    height, width = image.shape[:2]
    aspect = min(max(height / width, 0.4), 2.0)
    figure = Figure(
        figsize=(3.0 * (len(maps) + 1), 3.0 * aspect + 1.25), layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    # Bars have a row of their own, so that all images are of one size.
    panels, bars = figure.subplots(
        2, len(maps) + 1, height_ratios=(3.0 * aspect, 0.1), squeeze=False
    )
    panels[0].imshow(image)
    panels[0].set_title("image and query")
    bars[0].set_axis_off()
    grey = image.astype(np.float64).mean(axis=2)
    for axes, bar, each in zip(panels[1:], bars[1:], maps, strict=True):
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
        axes.set_title(each.title)
        drawn = _draw_heat_map(axes, each, covered, own)
        figure.colorbar(drawn, cax=bar, orientation="horizontal")
        bar.xaxis.set_major_locator(MaxNLocator(4))
        bar.tick_params(labelsize=7)
        bar.set_xlabel(each.caption, fontsize=8)
    for axes in panels:
        for colour, line in (("white", 3.5), ("limegreen", 1.8)):
            axes.plot(*point, "o", mfc="none", mec=colour, ms=10, mew=line)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks([])
    save_figure(figure, path, dpi=110)


def _draw_heat_map(
    axes: Axes, heat_map: HeatMap, covered: tuple[int, int], own: tuple[int, int]
) -> AxesImage:
    elsewhere = np.abs(heat_map.weights)
    elsewhere[own] = 0.0
    limit = float(elsewhere.max()) or 1.0
    return axes.imshow(
        heat_map.weights,
        cmap="RdBu_r" if heat_map.signed else "inferno",
        vmin=-limit if heat_map.signed else 0.0,
        vmax=limit,
        extent=(-0.5, covered[1] - 0.5, covered[0] - 0.5, -0.5),
        alpha=0.75,
        interpolation="nearest",
    )
