"""Figures of an alignment and of a scan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcastling.alignment.scanning import ScanRow
from mmcastling.errors import OptionError
from mmcastling.show.figures import Figure, save_figure, tidy


def plot_errors(
    before: dict[str, float], after: dict[str, float], path: str | Path
) -> None:
    """Draw each attention's error before and after an alignment, as a PNG file."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(before))
    for name, values, colour in (
        ("castled", before, "tab:grey"),
        ("aligned", after, "tab:blue"),
    ):
        axes.plot(places, list(values.values()), "o-", color=colour, label=name)
    axes.set_yscale("log")
    axes.set_xticks(list(places))
    axes.set_xlabel("castled attention, in the order of the network")
    axes.set_ylabel("relative squared error")
    tidy(axes)
    axes.legend(frameon=False)
    axes.set_title("Error of the attentions on pictures not trained on", loc="left")
    save_figure(figure, path, dpi=130)


def plot_scan(rows: Sequence[ScanRow], path: str | Path) -> None:
    """Draw damage and milliseconds saved of each attention alone, as a PNG file."""
    if not rows:
        raise OptionError("there is no row to draw")
    figure = Figure(figsize=(7, 4), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    places = range(len(rows))
    panels[0].bar(places, [row.damage for row in rows], color="tab:red")
    panels[0].set_ylabel("damage to features")
    panels[1].bar(places, [row.saved_ms for row in rows], color="tab:green")
    panels[1].set_ylabel("ms saved")
    panels[1].set_xticks(list(places))
    panels[1].set_xlabel("attention castled alone, in the order of the network")
    for axes in panels:
        tidy(axes)
    save_figure(figure, path, dpi=130)
