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

from mmcastling.errors import ConfigError, OptionError
from mmcastling.registry import MODELS, model_spec
from mmcastling.run.config import check_data, check_work_dir, require
from mmcastling.run.runner import build_runner, run_test, testing_config
from mmcastling.runtime import (
    Classification,
    Detections,
    ExportedInferencer,
    ExportMetadata,
    Prediction,
    Segmentation,
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
        data_preprocessor: The config's, so that images are prepared as for torch.

    Attributes:
        inferencer: The file, to be set before the first image: a runner builds its
            model from plain values.
        seconds: Of each image.
    """

    inferencer: ExportedInferencer

    def __init__(self, data_preprocessor: dict[str, Any] | None = None) -> None:
        super().__init__(data_preprocessor)
        self.seconds: list[float] = []

    def forward(
        self, inputs: Tensor, data_samples: list[Any], mode: str = "predict"
    ) -> list[Any]:
        """Predict images ``(B, 3, H, W)`` into their samples, as other models do."""
        if mode != "predict":
            raise OptionError(f"mode {mode!r}: an exported file can only 'predict'")
        for image, sample in zip(inputs, data_samples, strict=True):
            begin = time.perf_counter()
            meta, shape = sample.metainfo, image.shape[1:]
            prepared = Prepared(
                image[None].cpu().numpy(),
                tuple(meta.get("img_shape", shape)[:2]),
                tuple(meta.get("ori_shape", shape)[:2]),
                tuple(meta.get("scale_factor") or (1.0, 1.0)),
            )
            add_prediction(sample, self.inferencer.predict_prepared(prepared))
            self.seconds.append(time.perf_counter() - begin)
        return data_samples


def add_prediction(sample: Any, found: Prediction) -> None:
    """Put what an exported file predicted where the toolboxes' own models put it.

    Features have no place in a sample.
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

    Dataset, pipeline, data preprocessor and evaluator are the config's, so that the
    figures are comparable with those of :func:`mmcastling.run.evaluate`.

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
    inferencer = ExportedInferencer(path, runtime)
    if inferencer.metadata.kind == "backbone":
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
        type="mmcastling.ExportedTestModel", data_preprocessor=preprocessor
    )
    runner = build_runner(cfg)
    model = runner.model
    model.inferencer = inferencer
    metrics = run_test(runner)
    seconds = statistics.median(model.seconds) if model.seconds else float("nan")
    return ExportedEvaluation(
        metrics, seconds, inferencer.model.runtime, inferencer.metadata
    )
