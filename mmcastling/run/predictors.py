"""One picture in, one prediction out: by a checkpoint in torch, or an exported file."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement

from mmcastling.checkpoint import load_checkpoint
from mmcastling.compat.model_index import find_config
from mmcastling.deploy import check_precision, is_deployed, set_precision
from mmcastling.errors import ConfigError
from mmcastling.registry import type_name
from mmcastling.run.config import datasets_of, load_config, require
from mmcastling.run.exported import add_prediction
from mmcastling.run.runner import build_model, load_trained
from mmcastling.runtime import ExportedInferencer, is_exported
from mmcastling.verbs import switch_to_deploy

TOOLBOXES = {"detector": "mmdet", "classifier": "mmpretrain", "segmentor": "mmseg"}
"""Whose data samples and visualizer each kind of model has."""


class Predictor(Protocol):
    """What predicts.

    Attributes:
        scope: The toolbox that draws what it predicts.
        dataset_meta: ``classes`` and ``palette``, where they are known.
        name: What predicts, in words.
    """

    scope: str
    dataset_meta: dict[str, Any]
    name: str

    def __call__(self, image: np.ndarray) -> tuple[BaseDataElement, float]:
        """Predict a picture ``(H, W, 3)`` in BGR.

        Returns:
            The toolbox's data sample, in the picture's pixels, and the seconds from the
            picture in memory to it.
        """


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
        ConfigError: If these are not such files, or an option does not go with them.
        CheckpointError, ExportedModelError: If a file cannot be read.
    """
    if len(model) == 1 and is_exported(model[0]):
        if device not in (None, "cpu"):
            raise ConfigError(
                f"--device {device}: exported files run on the CPU here; leave it out"
            )
        return ExportedPredictor(model[0], runtime)
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
    return TorchPredictor(load_config(config), model[1], device)


def _usage(model: list[str]) -> str:
    given = " ".join(model)
    path = Path(model[0])
    if len(model) == 1 and path.suffix in (".pth", ".pt"):
        beside = path.with_suffix(".py")
        known = f", {beside} perhaps" if beside.is_file() else ""
        return f"checkpoint {given} needs its config in front of it{known}"
    if len(model) == 1 and not is_exported(path):
        return f"config {given} needs a checkpoint after it"
    return (
        f"expected CONFIG CHECKPOINT, or one exported file (.onnx, .xml, .torchscript "
        f"or .pt2), got {given}"
    )


class TorchPredictor:
    """A config's model in its deployed form, with the config's test pipeline.

    Args:
        cfg: A config from :func:`mmcastling.run.load_config`.
        checkpoint: A training or deployed checkpoint of it.
        device: See :func:`build_predictor`.

    Raises:
        ConfigError: If the config has no test pipeline, or the device is not there.
        CheckpointError: If the checkpoint cannot be read or does not fit.
        ValueError, RuntimeError: If the machine lacks the config's precision.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | os.PathLike[str],
        device: str | None = None,
    ) -> None:
        require(cfg, "test_dataloader")
        self.device = _device(device)
        precision = cfg.get("precision", "fp32")
        check_precision(precision, self.device)
        self.scope = cfg.get("default_scope", "mmengine")
        if self.scope not in TOOLBOXES.values():
            raise ConfigError(
                f"config {cfg.filename} is of {self.scope!r}; pictures are drawn for "
                f"{', '.join(TOOLBOXES.values())}"
            )
        loaded = load_checkpoint(checkpoint)
        dataset = next(datasets_of(cfg, "test"))
        self.dataset_meta = _dataset_meta(dataset, loaded)
        self.pipeline = Compose(_without_loading(dataset.pipeline))
        self.model = build_model(cfg)
        load_trained(self.model, loaded, checkpoint)
        switch_to_deploy(self.model, inplace=True)
        self.model.to(self.device).eval()
        set_precision(self.model, precision)
        self.name = f"torch in {precision} on {self.device}"
        if not is_deployed(loaded):
            self.name += ", pruned"

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> tuple[BaseDataElement, float]:
        begin = time.perf_counter()
        shape = image.shape[:2]
        data = dict(img=image, img_shape=shape, ori_shape=shape, img_id=0, img_path="")
        batch = pseudo_collate([self.pipeline(data)])
        (sample,) = self.model.test_step(batch)
        sample = sample.cpu()  # waits for a GPU
        return sample, time.perf_counter() - begin


class ExportedPredictor:
    """An exported file in its runtime, with the preparation that stands in it.

    Args:
        path: The file.
        runtime: See :func:`build_predictor`.

    Raises:
        ExportedModelError: If the file or the runtime cannot be used.
        ConfigError: If it holds a backbone.
    """

    def __init__(
        self, path: str | os.PathLike[str], runtime: str | None = None
    ) -> None:
        self.inferencer = ExportedInferencer(path, runtime)
        metadata = self.inferencer.metadata
        if metadata.kind not in TOOLBOXES:
            raise ConfigError(
                f"{path} holds a {metadata.kind}, which predicts nothing that could be "
                "drawn: export the whole model"
            )
        self.scope = TOOLBOXES[metadata.kind]
        palette = [tuple(colour) for colour in metadata.palette] or None
        self.dataset_meta = dict(classes=metadata.classes or None, palette=palette)
        self.name = f"{self.inferencer.model.runtime} in {metadata.precision}"

    def __call__(self, image: np.ndarray) -> tuple[BaseDataElement, float]:
        begin = time.perf_counter()
        found = self.inferencer.predict(image)
        seconds = time.perf_counter() - begin
        sample = BaseDataElement()
        add_prediction(sample, found)
        return sample, seconds


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


def _dataset_meta(dataset: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Classes and palette: of the checkpoint, then the config, then its dataset."""
    kind = DATASETS.get(dataset.type) if isinstance(dataset.type, str) else dataset.type
    sources = (
        getattr(kind, "METAINFO", None),
        dataset.get("metainfo"),
        (checkpoint.get("meta") or {}).get("dataset_meta"),
    )
    meta: dict[str, Any] = dict(classes=None, palette=None)
    for source in sources:
        found = {key.lower(): value for key, value in (source or {}).items()}
        if found.get("classes") and found["classes"] != meta["classes"]:
            meta.update(classes=found["classes"], palette=None)
        if found.get("palette"):
            meta["palette"] = [tuple(colour) for colour in found["palette"]]
    return meta


def _without_loading(pipeline: list[Any]) -> list[Any]:
    steps = [
        copy.deepcopy(step)
        for step in pipeline
        if not type_name(step["type"]).startswith("Load")
    ]
    if len(steps) == len(pipeline):
        raise ConfigError(
            "the config's test pipeline loads no image: expected LoadImageFromFile as "
            "its first step"
        )
    return steps
