"""Seconds of a training step of every attention, measured in turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmpretrain.structures import DataSample

from benchmarks.study.fashion import Data, initialised
from benchmarks.study.variants import TABLE_A, VARIANTS, Recipe
from mmcastling.analysis import paired_seconds
from mmcastling.analysis.machine import environment
from mmcastling.checkpoint import write_json_atomically
from mmcastling.verbs import set_mask

ROUNDS = 15


def training_step(name: str, data: Data, recipe: Recipe, on: bool) -> Callable[[], Any]:
    """Loss, gradients and update of a fresh network on its first batch."""
    variant = VARIANTS[name]
    model = initialised(variant.model(), variant.window, seed=0)
    if not on:
        set_mask(model, 1.0)
    inputs = data.train.images[: recipe.batch_size]
    inputs = model.data_preprocessor(dict(inputs=inputs))["inputs"]
    labels = data.train.labels[: recipe.batch_size]
    samples = [DataSample().set_gt_label(label) for label in labels]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        sum(model.loss(inputs, samples).values()).backward()
        optimizer.step()

    return step


def measure(data: Data, recipe: Recipe, path: Path, rounds: int = ROUNDS) -> None:
    """Time all of table (a) and store the seconds of each round."""
    steps = {
        name: training_step(name, data, recipe, on=True)
        for name in TABLE_A
        if name != "decay"  # the same step as with a fixed threshold, or:
    }
    steps["decayed"] = training_step("decay", data, recipe, on=False)
    seconds = paired_seconds(steps, rounds)
    result = dict(
        batch_size=recipe.batch_size, seconds=seconds, environment=environment()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, result)
