"""The plots of docs/speed.md, from a stored result of benchmarks/backbones.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")


def plot_resolution(result: dict[str, Any], path: Path) -> None:
    """Latency and memory of every backbone over the image's pixels."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(cell["contender"] for cell in result["cells"]))
    for index, name in enumerate(names):
        cells = [cell for cell in result["cells"] if cell["contender"] == name]
        pixels = [cell["size"][0] * cell["size"][1] for cell in cells]
        style = dict(marker="o", color=matplotlib.colormaps["tab20"](index), label=name)
        if name.startswith("Castling"):
            style.update(linewidth=2.5)
        axes[0].plot(pixels, [1e3 * c["seconds"]["median"] for c in cells], **style)
        axes[1].plot(pixels, [c["memory"] / 1e6 for c in cells], **style)
    sizes = sorted({tuple(cell["size"]) for cell in result["cells"]})
    for axis, title in zip(axes, ("latency, ms", "peak memory, MB"), strict=True):
        axis.set(title=title, xscale="log", yscale="log", xlabel="image")
        axis.set_xticks([h * w for h, w in sizes], [f"{h}x{w}" for h, w in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


def plot_macs(result: dict[str, Any], path: Path) -> None:
    """Latency over MACs at the largest size, a point per backbone."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for cell in result["cells"]:
        if tuple(cell["size"]) != backbones.LARGE:
            continue
        castled = cell["contender"].startswith("Castling")
        point = cell["macs"] / 1e9, 1e3 * cell["seconds"]["median"]
        axis.scatter(*point, color="tab:red" if castled else "tab:gray", zorder=3)
        # Ours and the softmax twins have neighbours on the right.
        left = castled or cell["contender"].endswith("softmax")
        axis.annotate(
            cell["contender"],
            point,
            (-6 if left else 6, -3),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
        )
    height, width = backbones.LARGE
    axis.set(xscale="log", yscale="log", title=f"{height}x{width}")
    axis.set(xlabel="GMACs", ylabel="latency, ms")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
