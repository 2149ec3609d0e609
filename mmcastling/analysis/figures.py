"""Figures of a training run and of its predictions, as PNG files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

GROUPS = ("early", "middle", "late")


@dataclass(frozen=True)
class MaskHistory:
    """What MaskDecayHook logged over a run.

    Attributes:
        steps: Iterations, one per record.
        density: Fraction of pairs that survived the mask, averaged over layers.
        groups: The same for the early, middle and late layers.
        threshold: The part of the threshold that does not depend on the number of
            tokens.
        weight: The branch's factor.
    """

    steps: list[int]
    density: list[float]
    threshold: list[float]
    weight: list[float]
    groups: dict[str, list[float]] = field(default_factory=dict)


def read_mask_history(work_dir: str | Path) -> MaskHistory:
    """Read the newest run's mask records from a work directory.

    Args:
        work_dir: A work directory that training with ``MaskDecayHook`` has written.

    Raises:
        ValueError: If there is none in it.
    """
    files = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    records: list[dict[str, Any]] = []
    if files:
        lines = (json.loads(line) for line in files[-1].read_text().splitlines())
        records = [line for line in lines if "mask_density" in line]
    if not records:
        raise ValueError(
            f"{work_dir} holds no record of mask density: train with MaskDecayHook in "
            "custom_hooks and the work directory set to it"
        )
    return MaskHistory(
        steps=[record["step"] for record in records],
        density=[record["mask_density"] for record in records],
        threshold=[record["mask_threshold"] for record in records],
        weight=[record["mask_weight"] for record in records],
        groups={
            name: [record[f"mask_density_{name}"] for record in records]
            for name in GROUPS
            if f"mask_density_{name}" in records[0]
        },
    )


def plot_mask_density(history: MaskHistory, path: str | Path) -> None:
    """Draw density, threshold and weight over training."""
    # Figure instead of pyplot: no display, and no global backend to disturb.
    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, values in history.groups.items():
        top.plot(history.steps, values, lw=1, label=f"{name} layers")
    top.plot(history.steps, history.density, color="black", lw=2, label="all layers")
    # Zero must be visible: linear below the smallest decade, logarithmic above.
    top.set_yscale("symlog", linthresh=1e-5)
    top.set_ylim(bottom=0)
    top.set_ylabel("pairs that survive the mask")
    top.legend(frameon=False)
    bottom.plot(history.steps, history.threshold, color="tab:red", label="threshold")
    bottom.plot(history.steps, history.weight, color="tab:blue", label="weight")
    bottom.set_ylim(-0.03, 1.05)
    bottom.set_xlabel("iteration")
    bottom.legend(frameon=False)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    top.set_title("The auxiliary softmax masks fall to zero", loc="left")
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Instances:
    """Objects in one image.

    Attributes:
        boxes: ``(n, 4)`` corners ``x1, y1, x2, y2`` in pixels.
        masks: ``(n, H, W)`` booleans.
    """

    boxes: np.ndarray
    masks: np.ndarray


def plot_predictions(
    images: Sequence[np.ndarray],
    truths: Sequence[Instances],
    predictions: Sequence[Instances],
    path: str | Path,
) -> None:
    """Draw each image beside its ground truth and its predictions.

    Args:
        images: RGB images ``(H, W, 3)``.
        truths: Ground truth, one per image.
        predictions: Predictions, one per image.
        path: PNG file to write.
    """
    figure = Figure(figsize=(9, 3.1 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), 3, squeeze=False)
    for row, image, truth, prediction in zip(
        grid, images, truths, predictions, strict=True
    ):
        row[0].imshow(image)
        row[1].imshow(_painted(image, truth))
        row[2].imshow(_painted(image, prediction))
        row[1].set_xlabel(f"{len(truth.masks)} objects")
        row[2].set_xlabel(f"{len(prediction.masks)} objects")
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, title in zip(
        grid[0], ("image", "ground truth", "prediction"), strict=True
    ):
        axes.set_title(title)
    figure.savefig(path, dpi=110)


def _painted(image: np.ndarray, instances: Instances) -> np.ndarray:
    painted = image.astype(np.float64)
    colours = 255 * matplotlib.colormaps["hsv"](np.linspace(0, 1, 9))[:8, :3]
    for index, mask in enumerate(instances.masks):
        colour = colours[index % len(colours)]
        inner = mask.copy()
        inner[1:-1, 1:-1] &= (
            mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        )
        painted[mask] = 0.65 * painted[mask] + 0.35 * colour
        painted[mask & ~inner] = colour
    return painted.clip(0, 255).astype(np.uint8)
