"""A config's model with a checkpoint's weights, as trained or pruned for use.

Testing, conversion, export and the demo all get their model here.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmcastling.analysis import count_macs, input_channels
from mmcastling.checkpoint import load_weights
from mmcastling.deploy import (
    best_precision,
    difference_of,
    features,
    is_deployed,
    select_weights,
)
from mmcastling.errors import CheckpointError
from mmcastling.registry import model_spec
from mmcastling.run.config import check_data, has_data, require
from mmcastling.run.runner import core_model, say, say_warnings
from mmcastling.verbs import castling_modules, restore_mask, set_mask, switch_to_deploy

TOLERANCE = 1e-5
"""Largest difference of features, relative to the largest feature or 1, that counts as
equal: float32 rounding, not a branch that is still on."""


@dataclass(frozen=True)
class PruningReport:
    """What pruning the auxiliary branches of a model removed and changed.

    Attributes:
        attentions: How many had a branch.
        was_on: Whether the branch still contributed, by the state of the checkpoint.
        difference: Largest difference that pruning made to the features (outputs of
            backbone and neck), or None where not measured. NaN where one is not finite.
        magnitude: Largest of these features before.
        images: Test images on which it was measured.
        shape: ``(H, W)`` of the first of them, padded, at which costs are counted.
        macs_training: MACs of the backbone for one image, with the branch on.
        macs_deployed: The same without.
    """

    attentions: int
    was_on: bool
    difference: float | None = None
    magnitude: float = 0.0
    images: int = 0
    shape: tuple[int, int] = (0, 0)
    macs_training: int = 0
    macs_deployed: int = 0

    def __str__(self) -> str:
        text = f"pruned the auxiliary softmax branch of {self.attentions} attentions"
        if self.difference is None:
            why = "the test data is missing or was not asked for"
            return f"{text}\nnot verified on images: {why}"
        height, width = self.shape
        return (
            f"{text}: the backbone at {height}x{width} takes "
            f"{self.macs_deployed / 1e9:.3f} GMACs, {self.macs_training / 1e9:.3f} "
            f"with the branch on (-{1 - self.macs_deployed / self.macs_training:.1%})\n"
            f"largest difference of features on {self.images} images: "
            f"{self.difference:.3g}, of values up to {self.magnitude:.3g}"
        )

    def refuse_if_changed(self, source: str | os.PathLike[str]) -> None:
        """Raise a :class:`CheckpointError` if pruning changes what the model computes.

        That is, if the features differ or are not finite, or, where that was not
        measured, the state of the checkpoint says that the branch is on.
        """
        changed, measured = self.was_on, "its state says that the branch is on"
        if self.difference is not None:
            if math.isnan(self.difference):
                raise CheckpointError(
                    f"the features of {source} are not finite: training diverged. Use "
                    "an earlier checkpoint, or write it anyway with --force"
                )
            measured = f"pruning changes the features by up to {self.difference:.3g}"
            changed = self.difference > TOLERANCE * max(1.0, self.magnitude)
        if changed:
            raise CheckpointError(
                f"the masks of {source} have not decayed: {measured}. Train until "
                "MaskDecayHook has finished, or write it anyway with --force"
            )


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model as a runner does, without a runner."""
    return MODELS.build(model_spec(cfg))


def load_model(
    cfg: Config,
    checkpoint: dict[str, Any],
    source: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    ema: bool | None = None,
) -> nn.Module:
    """A config's model with the weights and the masks of a checkpoint.

    A deployed checkpoint's model is deployed first, whatever the config says:
    deployment folds layers into others, and names and shapes are those after it.

    The model, which is built where it is not given, is in evaluation mode. ``source``
    is the checkpoint's path, for messages; for ``ema`` see
    :func:`mmcastling.deploy.select_weights`.
    """
    if model is None:
        model = build_model(cfg)
    if is_deployed(checkpoint):
        switch_to_deploy(model, inplace=True)
    restore_mask(model, checkpoint)
    weights = {"state_dict": select_weights(checkpoint, ema)}
    load_weights(model, weights, str(source))
    return model.eval()


def load_pruned_model(
    cfg: Config,
    checkpoint: dict[str, Any],
    source: str | os.PathLike[str],
    *,
    runner: Runner | None = None,
    ema: bool | None = None,
    verify: bool | None = None,
    images: int = 4,
) -> tuple[nn.Module, PruningReport | None]:
    """A config's model with a checkpoint's weights, without its auxiliary branches.

    What pruning changes and saves is measured on so many test images, if ``verify`` is
    True, or None and the data is there. Model and test data are those of the runner,
    where there is one. See :func:`load_model` for the rest.

    Returns:
        The deployed model in evaluation mode; and what pruning did, or None where
        there was no branch to prune.
    """
    model = None if runner is None else core_model(runner.model)
    model = load_model(cfg, checkpoint, source, model=model, ema=ema)
    modules = [module for _, module in castling_modules(model)]
    if not modules:
        return switch_to_deploy(model, inplace=True), None
    was_on = any(getattr(module, "mask_is_on", True) for module in modules)
    inputs: list[Tensor] = []
    if runner is not None:
        dataset = runner.test_dataloader.dataset
        inputs = list(first_test_images(cfg, model, images, dataset))
    elif verify or (verify is None and has_data(cfg, "test")):
        require(cfg, "test_dataloader")
        say_warnings(check_data(cfg, "test"))
        inputs = list(first_test_images(cfg, model, images))
    if not inputs:
        switch_to_deploy(model, inplace=True)
        return model, PruningReport(len(modules), was_on)
    backbone = getattr(model, "backbone", model)
    shape = tuple(inputs[0].shape[-2:])
    macs_training = backbone_macs(backbone, shape, branch_on=True)
    before = [feature for x in inputs for feature in features(model, x)]
    switch_to_deploy(model, inplace=True)
    after = [feature for x in inputs for feature in features(model, x)]
    report = PruningReport(
        len(modules),
        was_on,
        *difference_of(before, after),
        images=len(inputs),
        shape=shape,
        macs_training=macs_training,
        macs_deployed=backbone_macs(backbone, shape),
    )
    return model, report


def first_test_images(
    cfg: Config, model: nn.Module, count: int, dataset: Any = None
) -> Iterator[Tensor]:
    """The first test images as the network sees them, padded, ``(1, C, H, W)`` each.

    With test-time augmentation the first view of each. The test set is the config's,
    where it has not been built.
    """
    if dataset is None:
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    for index in range(min(count, len(dataset))):
        item = dataset[index]
        if isinstance(item["inputs"], (list, tuple)):
            item = {key: views[0] for key, views in item.items()}
        yield preprocess(model, item)


def choose_precision(cfg: Config, model: nn.Module, dataset: Any = None) -> str:
    """The precision for a deployed model at the size of the first test image.

    Says what was chosen and why. Of several processes the first one chooses.
    """
    chosen: list[str | None] = [None]
    if is_main_process():
        (image,) = first_test_images(cfg, model, 1, dataset)
        choice = best_precision(model, image.shape[2:])
        chosen = [choice.precision]
        say(str(choice))
    broadcast_object_list(chosen)
    return str(chosen[0])


def preprocess(model: nn.Module, item: dict[str, Any]) -> Tensor:
    """What the network sees ``(1, C, H, W)`` of what the pipeline packed."""
    inputs = model.data_preprocessor(pseudo_collate([item]), False)["inputs"]
    return torch.stack(list(inputs)) if isinstance(inputs, list) else inputs


def backbone_macs(
    backbone: nn.Module, shape: tuple[int, int], branch_on: bool = False
) -> int:
    """MACs of a backbone for one image ``(H, W)``, as it is or with its branch on."""
    copied = copy.deepcopy(backbone)
    if branch_on:
        set_mask(copied, 0.0)
    # With fake tensors nothing is computed, so any resolution is counted at once. They
    # keep their device, unlike the meta device's, for which torch has no autocast.
    device = next(copied.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.empty(1, input_channels(copied), *shape, device=device)
        return count_macs(copied, images).macs
