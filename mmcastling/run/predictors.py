"""One picture in, one prediction out: by a checkpoint in torch, or an exported file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.structures import BaseDataElement

from mmcastling.checkpoint import load_checkpoint
from mmcastling.compat.model_index import find_config
from mmcastling.deploy import check_precision, is_deployed, set_precision
from mmcastling.errors import ConfigError
from mmcastling.run.config import (
    dataset_meta,
    datasets_of,
    load_config,
    pipeline_without_loading,
)
from mmcastling.run.exported import add_prediction
from mmcastling.run.load import load_pruned_model
from mmcastling.runtime import SUFFIXES, ExportedInferencer, is_exported

TOOLBOXES = {"detector": "mmdet", "classifier": "mmpretrain", "segmentor": "mmseg"}
"""Whose data samples and visualizer each kind of model has."""


@dataclass(frozen=True)
class Predictor:
    """What predicts: the deployed model, or an exported file's inferencer.

    Attributes:
        scope: The toolbox that draws what it predicts.
        dataset_meta: ``classes`` and ``palette``, where they are known.
        name: What predicts, in words.
        predict: From a picture ``(H, W, 3)`` in BGR to the toolbox's data sample, in
            the picture's pixels.
    """

    scope: str
    dataset_meta: dict[str, Any]
    name: str
    model: Any
    predict: Callable[[np.ndarray], BaseDataElement]

    def __call__(self, image: np.ndarray) -> tuple[BaseDataElement, float]:
        """The prediction for a picture, and the seconds that it took."""
        begin = time.perf_counter()
        sample = self.predict(image)
        return sample, time.perf_counter() - begin


def build_predictor(
    model: list[str], device: str | None = None, runtime: str | None = None
) -> Predictor:
    """Build what the command line names.

    Args:
        model: A config, or the name of one of ours, and its checkpoint; or an exported
            file alone.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:1'``. Defaults to None (a GPU where
            there is one; exported files run on the CPU).
        runtime: What runs an exported file. Defaults to None (its format's own).

    Raises:
        UserError: If these are not such files or cannot be read, an option does not go
            with them or with this machine, or what they predict cannot be drawn.
    """
    if len(model) == 1 and is_exported(model[0]):
        if device not in (None, "cpu"):
            raise ConfigError(
                f"--device {device}: exported files run on the CPU here; leave it out"
            )
        return _exported_predictor(model[0], runtime)
    if len(model) != 2 or is_exported(model[1]):
        raise ConfigError(_usage(model))
    if runtime not in (None, "torch"):
        raise ConfigError(
            f"--runtime {runtime} runs exported files, and {model[1]} is a checkpoint: "
            "export it with tools/export.py first, or leave the option out"
        )
    config = model[0]
    if Path(config).suffix != ".py" and not Path(config).exists():
        config = find_config(config)
    return _torch_predictor(load_config(config), model[1], _device(device))


def _usage(model: list[str]) -> str:
    given = " ".join(model)
    path = Path(model[0])
    if len(model) == 1 and path.suffix in (".pth", ".pt"):
        beside = path.with_suffix(".py")
        known = f", {beside} perhaps" if beside.is_file() else ""
        return f"checkpoint {given} needs its config in front of it{known}"
    if len(model) == 1:
        return f"config {given} needs a checkpoint after it"
    return (
        f"expected CONFIG CHECKPOINT, or one exported file ({', '.join(SUFFIXES)}), "
        f"got {given}"
    )


def _torch_predictor(
    cfg: Config, path: str | os.PathLike[str], device: torch.device
) -> Predictor:
    precision = cfg.get("precision", "fp32")
    check_precision(precision, device)
    scope = cfg.get("default_scope", "mmengine")
    if scope not in TOOLBOXES.values():
        raise ConfigError(
            f"config {cfg.filename} is of {scope!r}; pictures are drawn for "
            f"{', '.join(TOOLBOXES.values())}"
        )
    checkpoint = load_checkpoint(path)
    pipeline = Compose(pipeline_without_loading(cfg))
    model, _ = load_pruned_model(cfg, checkpoint, path, verify=False)
    model.to(device)
    set_precision(model, precision)

    @torch.inference_mode()
    def predict(image: np.ndarray) -> BaseDataElement:
        shape = image.shape[:2]
        data = dict(img=image, img_shape=shape, ori_shape=shape, img_id=0, img_path="")
        (sample,) = model.test_step(pseudo_collate([pipeline(data)]))
        return sample.cpu()  # waits for a GPU

    meta = dataset_meta(next(datasets_of(cfg, "test")), checkpoint)
    pruned = "" if is_deployed(checkpoint) else ", pruned"
    name = f"torch in {precision} on {device}{pruned}"
    return Predictor(scope, meta, name, model, predict)


def _exported_predictor(path: str, runtime: str | None) -> Predictor:
    inferencer = ExportedInferencer(path, runtime)
    metadata = inferencer.metadata
    if metadata.kind not in TOOLBOXES:
        raise ConfigError(
            f"{path} holds a {metadata.kind}, which predicts nothing that could be "
            "drawn: export the whole model"
        )

    def predict(image: np.ndarray) -> BaseDataElement:
        sample = BaseDataElement()
        add_prediction(sample, inferencer.predict(image))
        return sample

    meta = dict(classes=metadata.classes or None, palette=metadata.palette or None)
    name = f"{inferencer.model.runtime} in {metadata.precision}"
    return Predictor(TOOLBOXES[metadata.kind], meta, name, inferencer, predict)


def _device(name: str | None) -> torch.device:
    name = name or get_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {name} cannot be used here: {reason}; try --device cpu"
        ) from error
    return device
