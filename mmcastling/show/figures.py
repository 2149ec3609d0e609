"""Figures of a training run and of its predictions, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmcastling.analysis import Diagnosis
from mmcastling.checkpoint import write_atomically
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.show.run_log import MaskHistory

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
except ImportError as error:
    raise UnavailableError(
        f"figures are drawn with matplotlib ({error}): pip install matplotlib"
    ) from error


def save_figure(figure: Figure, path: str | Path, dpi: int) -> None:
    """Write a figure as PNG, whole or not at all (then a ``CheckpointError``)."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def tidy(axes: Axes) -> None:
    """Leave out the frame's upper and right side, and draw a pale grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def plot_mask_density(
    history: MaskHistory, path: str | Path, metrics: Sequence[str] | None = None
) -> None:
    """Draw density, threshold and metric over training, as a PNG file.

    Metrics are drawn by name, without any :meth:`MaskHistory.headlines`; they must have
    been logged.
    """
    names = history.headlines() if metrics is None else list(metrics)
    for name in names:
        if name not in history.metrics:
            found = ", ".join(history.metrics) or "none: the run never validated"
            raise OptionError(f"metric {name!r} is not in the log; there are: {found}")
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
        tidy(axes)
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


def plot_latency(found: Diagnosis, path: str | Path, title: str) -> None:
    """Draw latency against resolution, before castling and after, as a PNG file."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sides = [one.pixels**0.5 for one in found.measured]
    names = ("before, softmax", "castled and deployed")
    for index, (name, colour) in enumerate(
        zip(names, ("tab:red", "tab:blue"), strict=True)
    ):
        times = [one.milliseconds[index] for one in found.measured]
        axes.plot(sides, times, color=colour, marker="o", ms=4, label=name)
    if (size := found.crossing_size) is not None:
        side = found.crossing**0.5
        axes.axvline(side, color="black", ls="--", lw=1)
        left = side < (sides[0] + sides[-1]) / 2
        axes.annotate(
            f" faster from {size[0]}x{size[1]} on ",
            (side, 0.03),
            xycoords=("data", "axes fraction"),
            ha="left" if left else "right",
        )
    axes.set_xticks(
        sides, ["{}x{}".format(*one.size) for one in found.measured], rotation=45
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=30))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("milliseconds per image")
    axes.set_xlabel("size of the image, spaced by the root of its pixels")
    axes.set_title(f"{title}\n{found.machine_line}", loc="left", fontsize=9)
    tidy(axes)
    axes.legend(frameon=False, loc="upper left")
    save_figure(figure, path, dpi=130)


def draw_rows(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Draw rows of pictures, such as each image beside its truth and its prediction.

    They are RGB ``(H, W, 3)``; the titles stand over the columns.
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
