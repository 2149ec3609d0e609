"""Evaluate an exported file on a config's test set, in its own runtime."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from mmcastling.errors import ConfigError
from mmcastling.registry import MODELS, model_spec
from mmcastling.run.config import check_data, check_work_dir, require
from mmcastling.run.evaluation import run_test, testing_config
from mmcastling.run.runner import build_runner
from mmcastling.runtime import (
    Classification,
    Detections,
    ExportedInferencer,
    ExportMetadata,
    Prediction,
    Segmentation,
    load_exported,
)
from mmcastling.runtime.preprocess import Prepared


@dataclass(frozen=True)
class ExportedEvaluation:
    """The result of evaluating an exported file.

    Attributes:
        metrics: What the config's evaluator returned.
        seconds_per_image: Median over images from the preprocessed image to the
            prediction in the image's pixels.
        runtime: What ran the file.
        metadata: What the file says about its model.
    """

    metrics: dict[str, float]
    seconds_per_image: float
    runtime: str
    metadata: ExportMetadata

    def __str__(self) -> str:
        return (
            f"{self.seconds_per_image:.4f} s per image in {self.runtime}, median, "
            "network and post-processing; an exported file has no parts to time"
        )


@MODELS.register_module()
class ExportedTestModel(BaseModel):
    """An exported file in a model's place, for a runner that tests.

    Args:
        path: The exported file.
        runtime: As in :func:`~mmcastling.runtime.load_exported`.
        data_preprocessor: The config's, so that images are prepared as for torch.
    """

    def __init__(
        self,
        path: str,
        runtime: str | None = None,
        data_preprocessor: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor)
        self.inferencer = ExportedInferencer(load_exported(path, runtime))
        self.seconds: list[float] = []

    def forward(
        self, inputs: Tensor, data_samples: list[Any], mode: str = "predict"
    ) -> list[Any]:
        """Predict into the data samples, as the toolboxes' models do.

        Args:
            inputs: Preprocessed images ``(B, 3, H, W)``.
            data_samples: What the pipeline packed about each.
            mode: ``'predict'``.
        """
        if mode != "predict":
            raise ValueError(f"mode {mode!r}: an exported file can only 'predict'")
        for image, sample in zip(inputs, data_samples, strict=True):
            begin = time.perf_counter()
            self._predict(image[None], sample)
            self.seconds.append(time.perf_counter() - begin)
        return data_samples

    def _predict(self, image: Tensor, sample: Any) -> None:
        meta = sample.metainfo
        prepared = Prepared(
            image.cpu().numpy(),
            tuple(meta.get("img_shape", image.shape[2:])[:2]),
            tuple(meta.get("ori_shape", image.shape[2:])[:2]),
            tuple(meta.get("scale_factor") or (1.0, 1.0)),
        )
        add_prediction(sample, self.inferencer.predict_prepared(prepared))


def add_prediction(sample: Any, found: Prediction) -> None:
    """Put what an exported file predicted where the toolboxes' own models put it.

    Args:
        sample: A data sample of any toolbox.
        found: What the file predicted; features have no place in a sample.
    """
    if isinstance(found, Detections):
        instances = InstanceData(
            bboxes=torch.from_numpy(found.boxes),
            scores=torch.from_numpy(found.scores),
            labels=torch.from_numpy(found.labels),
        )
        if found.masks is not None:
            instances.masks = torch.from_numpy(found.masks)
        sample.pred_instances = instances
    elif isinstance(found, Segmentation):
        sample.seg_logits = PixelData(data=torch.from_numpy(found.logits))
        sample.pred_sem_seg = PixelData(data=torch.from_numpy(found.labels[None]))
    elif isinstance(found, Classification):
        sample.pred_score = torch.from_numpy(found.scores)
        sample.pred_label = torch.tensor([found.label])


def evaluate_exported(
    cfg: Config, path: str | os.PathLike[str], runtime: str | None = None
) -> ExportedEvaluation:
    """Evaluate an exported file on the config's test set.

    Images come through the config's own dataset, pipeline and data preprocessor, and
    the config's evaluator judges, so that the figures are comparable with those of
    :func:`mmcastling.run.evaluate`.

    Args:
        cfg: The config that the file was exported with, from
            :func:`mmcastling.run.load_config`.
        path: The exported file of a whole model.
        runtime: ``'onnxruntime'``, ``'openvino'`` or ``'torch'``. Defaults to None (the
            format's own).

    Raises:
        ExportedModelError: If the file or the runtime cannot be used.
        DatasetError, CocoFormatError: If the data is missing or malformed.
        ConfigError: If the file holds no whole model, or the work directory cannot be
            written.
    """
    require(cfg, "test_dataloader", "test_cfg", "test_evaluator")
    metadata = load_exported(path, runtime).metadata
    if metadata.kind == "backbone":
        raise ConfigError(
            f"{path} holds a backbone, which predicts nothing: export the whole model "
            "with --part model"
        )
    check_data(cfg, "test")
    check_work_dir(cfg.work_dir)
    cfg = testing_config(cfg)
    preprocessor = model_spec(cfg).get("data_preprocessor")
    if preprocessor is not None and cfg.get("default_scope") == "mmpretrain":
        preprocessor.setdefault("type", "ClsDataPreprocessor")  # as its classifiers do
    cfg.model = dict(
        type="mmcastling.ExportedTestModel",
        path=str(path),
        runtime=runtime,
        data_preprocessor=preprocessor,
    )
    runner = build_runner(cfg)
    metrics = run_test(runner)
    model = runner.model
    seconds = statistics.median(model.seconds) if model.seconds else float("nan")
    return ExportedEvaluation(
        metrics, seconds, model.inferencer.model.runtime, metadata
    )
