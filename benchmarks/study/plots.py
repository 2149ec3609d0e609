"""The plots of the study's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.statistics import Interval

Curve = tuple[Sequence[float], Sequence[float]]


def plot_means(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]], path: Path
) -> None:
    """Means with their intervals, a panel per data set.

    Args:
        panels: By the axis's label: intervals by series and row.
        path: PNG file to write.
    """
    rows = [max(len(series) for series in panel.values()) for panel in panels.values()]
    figure = Figure(figsize=(7, 0.8 + 0.36 * sum(rows)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, height_ratios=rows, squeeze=False)
    for axes, (label, panel) in zip(all_axes[:, 0], panels.items(), strict=True):
        titles = list(next(iter(panel.values())))
        for i, (name, series) in enumerate(panel.items()):
            shift = (i - (len(panel) - 1) / 2) * 0.28
            axes.errorbar(
                [value.mean for value in series.values()],
                [titles.index(title) + shift for title in series],
                xerr=[
                    value.half if value.count > 1 else 0.0 for value in series.values()
                ],
                fmt="o",
                ms=4,
                capsize=3,
                lw=1.2,
                label=name,
            )
        axes.set_yticks(range(len(titles)), titles)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        if len(panel) > 1:
            axes.legend(
                frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2
            )
        _tidy(axes)
    figure.savefig(path, dpi=130)


def plot_curves(curves: Mapping[str, Curve], label: str, path: Path) -> None:
    """Curves over training, zero visible on a logarithmic axis.

    Args:
        curves: Fraction of training and value, by name.
        label: Of the vertical axis.
        path: PNG file to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, (progress, values)) in enumerate(curves.items()):
        axes.plot(progress, values, lw=1.4, ls=("-", "--", ":")[i % 3], label=name)
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("fraction of training")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    figure.savefig(path, dpi=130)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
