"""Prune the model of an evaluation, and say what that saves and changes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmcastling.analysis import count_macs
from mmcastling.deploy import difference_of, features
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy


@dataclass(frozen=True)
class Pruning:
    """What deploying removed.

    Attributes:
        attentions: Attentions whose auxiliary branch was pruned.
        was_on: Whether the branch still contributed, so that the output changes.
        shape: ``(H, W)`` at which the backbone's cost was counted.
        macs_training: MACs of the backbone with the branch on, for one image.
        macs_deployed: MACs of the deployed backbone, for one image.
        difference: Largest difference that pruning made to an output of backbone and
            neck on the first batch. NaN where an output is not finite.
        magnitude: Largest of these outputs before.
        images: Images of that batch.
    """

    attentions: int
    was_on: bool
    shape: tuple[int, int]
    macs_training: int
    macs_deployed: int
    difference: float
    magnitude: float
    images: int

    def __str__(self) -> str:
        height, width = self.shape
        saved = 1.0 - self.macs_deployed / self.macs_training
        text = (
            f"pruned the auxiliary softmax branch of {self.attentions} attentions: the "
            f"backbone at {height}x{width} takes {self.macs_deployed / 1e9:.3f} GMACs, "
            f"{self.macs_training / 1e9:.3f} with the branch on (-{saved:.1%})\n"
            "largest difference that this made to the outputs of backbone and neck on "
            f"the first batch ({self.images} images): {self.difference:.3g}, of values "
            f"up to {self.magnitude:.3g}"
        )
        if self.was_on:
            text += (
                "\nwarning: the masks of this checkpoint have not decayed, so pruning "
                "changes the output; --no-deploy evaluates with the branch on"
            )
        return text


def prune(runner: Runner, model: nn.Module) -> Pruning | None:
    """Deploy the model of a runner in place.

    Args:
        runner: The runner, whose test set gives the images to compare on.
        model: Its model, inside any wrappers, with masks as they will be left out.

    Returns:
        What was pruned, or None where nothing is castled.
    """
    modules = [module for _, module in castling_modules(model)]
    if not modules:
        switch_to_deploy(model, inplace=True)
        return None
    was_on = any(module.mask_is_on for module in modules)
    backbone = getattr(model, "backbone", model)
    images = first_batch(runner, model)
    shape = (int(images.shape[-2]), int(images.shape[-1]))
    macs_training = branch_on_macs(backbone, shape)
    model.eval()
    before = features(model, images)
    switch_to_deploy(model, inplace=True)
    difference, magnitude = difference_of(before, features(model, images))
    return Pruning(
        attentions=len(modules),
        was_on=was_on,
        shape=shape,
        macs_training=macs_training,
        macs_deployed=_macs(backbone, shape),
        difference=difference,
        magnitude=magnitude,
        images=len(images),
    )


def first_batch(runner: Runner, model: nn.Module) -> Tensor:
    """The first test images ``(B, C, H, W)`` as the network sees them, padded.

    With test-time augmentation the first view of each.
    """
    loader = runner.test_dataloader
    dataset = loader.dataset
    count = min(loader.batch_size or 1, len(dataset))
    items: list[dict[str, Any]] = [dataset[index] for index in range(count)]
    if isinstance(items[0]["inputs"], (list, tuple)):
        items = [{key: views[0] for key, views in item.items()} for item in items]
    batch = loader.collate_fn(items)
    images = model.data_preprocessor(batch, False)["inputs"]
    return torch.stack(list(images)) if isinstance(images, list) else images


def branch_on_macs(backbone: nn.Module, shape: tuple[int, int]) -> int:
    """MACs of a backbone for one image with its auxiliary branch on, as in training."""
    copied = copy.deepcopy(backbone)
    set_mask(copied, 0.0)
    return _macs(copied, shape)


def _macs(backbone: nn.Module, shape: tuple[int, int]) -> int:
    # With fake tensors nothing is computed, so any resolution is counted at once. They
    # keep their device, unlike the meta device's, for which torch has no autocast.
    copied = copy.deepcopy(backbone)
    device = next(copied.parameters()).device
    with FakeTensorMode(allow_non_fake_inputs=True):
        return count_macs(copied, torch.empty(1, 3, *shape, device=device)).macs
