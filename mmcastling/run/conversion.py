"""Convert a training checkpoint for deployment: what ``tools/convert.py`` does."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn

from mmcastling.checkpoint import (
    CheckpointError,
    check_weights_fit,
    load_checkpoint,
    save_atomically,
)
from mmcastling.deploy import (
    check_precision,
    deploy_checkpoint,
    is_deployed,
    largest_difference,
    select_weights,
    set_precision,
)
from mmcastling.errors import ConfigError
from mmcastling.run.config import check_data, has_data, require
from mmcastling.run.deployed_config import deploy_config
from mmcastling.run.runner import build_model
from mmcastling.verbs import castling_modules, restore_mask, switch_to_deploy

TOLERANCE = 1e-5
"""Largest difference of features, relative to the largest feature or 1, that counts as
equal: float32 rounding, not a branch that is still on."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        checkpoint: The file that was written.
        config: The config written beside it.
        pruned: Attentions whose auxiliary branch was pruned.
        max_abs_diff: Largest difference of features, or None where not verified.
        images: Real images on which it was measured.
        precision: What the layers of the deployed model compute in.
        rounding: Largest difference of features that the lower precision makes,
            relative to the largest feature, or None where not measured.
    """

    checkpoint: Path
    config: Path
    pruned: int
    max_abs_diff: float | None
    images: int
    precision: str = "fp32"
    rounding: float | None = None


def convert(
    cfg: Config,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    verify: bool | None = None,
    force: bool = False,
    ema: bool | None = None,
    num_images: int = 4,
    precision: str = "fp32",
) -> ConversionReport:
    """Prune a trained model and write it with a config that builds it pruned.

    Args:
        cfg: The config that the checkpoint was trained with.
        source: The training checkpoint.
        out: Checkpoint to write; the config is written beside it as ``.py``.
        verify: Measure the largest difference on real images of the test set. None
            does so where the data is there. Defaults to None.
        force: Write although the masks have not decayed. Defaults to False.
        ema: See :func:`mmcastling.deploy.select_weights`. Defaults to None.
        num_images: Images to verify on. Defaults to 4.
        precision: What the deployed model's layers compute in, see
            :func:`mmcastling.deploy.set_precision`. The config names it and the weights
            stay float32, rounded when they are used. Defaults to ``'fp32'``.

    Raises:
        CheckpointError: If the source cannot be read or does not fit, the masks have
            not decayed and ``force`` is not given, or the output cannot be written.
        DatasetError: If ``verify`` is True and the data is missing.
        ValueError, RuntimeError: If the precision is not known or not supported.
    """
    check_precision(precision)
    source, out = Path(source), Path(out)
    checkpoint = load_checkpoint(source)
    if is_deployed(checkpoint):
        raise CheckpointError(f"checkpoint {source} has been deployed already")
    if out.suffix != ".pth":
        raise ConfigError(f"output {out} must end in .pth: its config goes beside it")
    config_path = out.with_suffix(".py")
    if out.resolve() == source.resolve():
        raise CheckpointError(
            f"output {out} is the input: training state would be lost"
        )
    if cfg.filename and config_path.resolve() == Path(cfg.filename).resolve():
        raise ConfigError(
            f"output {out} would put its config in place of the training config "
            f"{cfg.filename}: choose another name"
        )
    if out.is_dir() or config_path.is_dir():
        raise CheckpointError(f"cannot write {out} and {config_path}: one is a folder")
    if not out.parent.is_dir():
        raise CheckpointError(
            f"cannot write {out}: the folder {out.parent} does not exist: create it"
        )

    pruned = build_pruned(
        cfg, checkpoint, source, verify=verify, force=force, ema=ema, images=num_images
    )
    if not pruned.attentions:
        raise ConfigError(
            "the config's model has no auxiliary branch to prune: nothing is castled, "
            "or it is built with deploy=True"
        )
    deployed, images = pruned.model, pruned.images
    difference = pruned.difference

    facts = dict(source=source.name, max_abs_diff=difference)
    result = deploy_checkpoint(deployed, checkpoint.get("meta") or {}, **facts)
    deployed_cfg, rounding = deploy_config(cfg), None
    if precision != "fp32":
        deployed_cfg.precision = precision
        lowered = copy.deepcopy(deployed)
        set_precision(lowered, precision)
        if images:
            change, magnitude = largest_difference(deployed, lowered, images)
            rounding = change / magnitude
    _write_both(deployed_cfg, config_path, result, out)
    return ConversionReport(
        out,
        config_path,
        pruned.attentions,
        difference,
        len(images),
        precision,
        rounding,
    )


@dataclass(frozen=True)
class Pruned:
    """A model without its auxiliary branch.

    Attributes:
        model: The deployed model in evaluation mode, with the checkpoint's weights.
        attentions: Attentions that lost a branch.
        difference: Largest difference of features that it made, or None where not
            measured.
        images: Preprocessed test images on which it was measured, ``(B, 3, H, W)``.
    """

    model: nn.Module
    attentions: int
    difference: float | None
    images: list[Tensor]


def build_pruned(
    cfg: Config,
    checkpoint: dict[str, Any],
    source: Path,
    *,
    verify: bool | None = None,
    force: bool = False,
    ema: bool | None = None,
    images: int = 4,
) -> Pruned:
    """Build a config's model with a checkpoint's weights, and prune it if that is due.

    Args:
        cfg: The config.
        checkpoint: A loaded checkpoint of it, of training or deployed.
        source: Its path, for messages.
        verify: As in :func:`convert`.
        force: Prune although the masks have not decayed. Defaults to False.
        ema: As in :func:`convert`.
        images: Images to measure the difference on. Defaults to 4.

    Raises:
        CheckpointError: If the weights do not fit, or the masks have not decayed and
            ``force`` is not given.
        DatasetError: If ``verify`` is True and the data is missing.
    """
    weights = select_weights(checkpoint, ema)
    model = build_model(cfg)
    if is_deployed(checkpoint):  # pruned, whatever the config says
        switch_to_deploy(model, inplace=True)
    check_weights_fit(model, {"state_dict": weights}, str(source))
    model.load_state_dict(weights)
    model.eval()
    attentions = sum(1 for _ in castling_modules(model))
    if not attentions:
        return Pruned(switch_to_deploy(model), 0, None, [])
    restore_mask(model, checkpoint)
    still_on = any(module.mask_is_on for _, module in castling_modules(model))
    deployed = switch_to_deploy(model)

    batches, difference = [], None
    if verify or (verify is None and has_data(cfg, "test")):
        require(cfg, "test_dataloader")
        check_data(cfg, "test")
        batches = list(_test_images(cfg, model, images))
    if batches:
        difference, magnitude = largest_difference(model, deployed, batches)
        still_on = not difference <= TOLERANCE * max(1.0, magnitude)  # also where NaN
    if difference is not None and math.isnan(difference) and not force:
        raise CheckpointError(
            f"the features of {source} are not finite: training diverged. Use an "
            "earlier checkpoint, or write it anyway with --force"
        )
    if still_on and not force:
        measured = (
            "its state says that the branch is on"
            if difference is None
            else f"pruning changes the features by up to {difference:.3g}"
        )
        raise CheckpointError(
            f"the masks of {source} have not decayed: {measured}. Train until "
            "MaskDecayHook has finished, or write it anyway with --force"
        )
    return Pruned(deployed, attentions, difference, batches)


def _test_images(cfg: Config, model: nn.Module, count: int) -> Iterator[Tensor]:
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    for index in range(min(count, len(dataset))):
        batch = pseudo_collate([dataset[index]])
        inputs = model.data_preprocessor(batch, False)["inputs"]
        yield torch.stack(list(inputs)) if isinstance(inputs, list) else inputs


def _write_both(cfg: Config, config_path: Path, checkpoint: dict, out: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".convert-") as folder:
            config = Path(folder) / config_path.name
            weights = Path(folder) / out.name
            cfg.dump(config)
            save_atomically(checkpoint, weights)
            load_checkpoint(weights)  # proves that it loads with weights_only=True
            config.replace(config_path)
            weights.replace(out)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
