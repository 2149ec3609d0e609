"""Evaluate an exported file on a config's test set, in its own runtime."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from mmcastling.analysis import PartTimer
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
        seconds_per_image: From the preprocessed image to the prediction in the image's
            pixels, median over batches.
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

    Images are prepared as for torch, by the config's ``data_preprocessor``. A runner
    builds its model from plain values, so the file is set afterwards.
    """

    inferencer: ExportedInferencer

    def forward(
        self, inputs: Tensor, data_samples: list[Any], mode: str = "predict"
    ) -> list[Any]:
        """Predict images ``(B, 3, H, W)`` into their samples, as other models do."""
        if mode != "predict":
            raise OptionError(f"mode {mode!r}: an exported file can only 'predict'")
        for image, sample in zip(inputs, data_samples, strict=True):
            meta, shape = sample.metainfo, image.shape[1:]
            prepared = Prepared(
                image[None].cpu().numpy(),
                tuple(meta.get("img_shape", shape)[:2]),
                tuple(meta.get("ori_shape", shape)[:2]),
                tuple(meta.get("scale_factor") or (1.0, 1.0)),
            )
            add_prediction(sample, self.inferencer.predict_prepared(prepared))
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
    """Evaluate the exported file of a whole model on its config's test set.

    Dataset, pipeline, data preprocessor and evaluator are the config's, so that the
    figures are comparable with those of :func:`mmcastling.run.evaluate`, which see for
    arguments and errors.
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
    with PartTimer(model) as timer:
        metrics = run_test(runner)
    seconds = timer.median / cfg.test_dataloader.get("batch_size", 1)
    return ExportedEvaluation(
        metrics, seconds, inferencer.model.runtime, inferencer.metadata
    )
