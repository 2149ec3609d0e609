"""Evaluate a checkpoint, pruned by default, or an exported file: ``tools/test.py``."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.model import BaseModel, BaseTTAModel
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from mmcastling.analysis import PartTimer
from mmcastling.checkpoint import load_checkpoint
from mmcastling.deploy import AUTO, check_precision, is_deployed, set_precision
from mmcastling.errors import ConfigError, OptionError
from mmcastling.files import check_writable
from mmcastling.registry import MODELS, model_spec, type_name
from mmcastling.run.config import (
    check_data,
    datasets_of,
    require,
)
from mmcastling.run.load import (
    PruningReport,
    choose_precision,
    load_model,
    load_pruned_model,
)
from mmcastling.run.runner import (
    build_runner,
    core_model,
    run_test,
    say,
    say_warnings,
    testing_config,
)
from mmcastling.run.work_dir import check_work_dir
from mmcastling.runtime import (
    SUFFIXES,
    Classification,
    Detections,
    ExportedInferencer,
    ExportMetadata,
    Prediction,
    Segmentation,
    is_exported,
)
from mmcastling.runtime.preprocess import Prepared


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: What the config's evaluator returned.
        seconds_per_image: Median forward time over batches, divided by their size;
            of one view with test-time augmentation.
        pruning: What deploying removed, or None where nothing was.
        parts: The same time, by the parts of :class:`mmcastling.analysis.PartTimer`;
            empty where a model cannot be split.
    """

    metrics: dict[str, float]
    seconds_per_image: float
    pruning: PruningReport | None
    precision: str = "fp32"
    parts: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        split = ", ".join(f"{part} {time:.4f}" for part, time in self.parts.items())
        return (
            f"{self.seconds_per_image:.4f} s per image in {self.precision}, median "
            f"forward pass{': ' if split else ''}{split}"
        )


def evaluate(
    cfg: Config,
    path: str | os.PathLike[str],
    *,
    deploy: bool = True,
    precision: str | None = None,
    runtime: str | None = None,
) -> Evaluation | ExportedEvaluation:
    """Evaluate a checkpoint in torch, or an exported file in its runtime.

    Args:
        cfg: A config from :func:`mmcastling.run.load_config`.
        path: A training or deployed checkpoint of that config, or a file that
            ``tools/export.py`` wrote.
        deploy: Prune before evaluating, and say what that saved. Defaults to True.
        precision: What layers compute in, see :func:`mmcastling.deploy.set_precision`.
            ``'auto'`` is that of :func:`mmcastling.deploy.best_precision` at the size
            of the first test image. Defaults to None (the config's ``precision``, which
            the converter writes, or ``'fp32'``; an exported file has its own).
        runtime: ``'torch'``, ``'onnxruntime'`` or ``'openvino'``. Defaults to None
            (torch for a checkpoint, the format's own for an exported file).

    Raises:
        UserError: If file, data or work directory cannot be used, or an option does not
            go with the kind of file or with this machine.
    """
    if is_exported(path):
        for given, option, why in (
            (not deploy, "--no-deploy", "holds the pruned graph only"),
            (precision is not None, f"--precision {precision}", "keeps its own"),
            ("module" in cfg.model, "--tta", "takes one view of an image"),
        ):
            if given:
                raise ConfigError(
                    f"{option}: the exported file {path} {why}; leave the option out, "
                    "or evaluate the checkpoint"
                )
        say("pruned nothing: an exported file holds the pruned graph")
        return evaluate_exported(cfg, path, runtime)
    if runtime not in (None, "torch"):
        endings = [suffix for suffix, runs in SUFFIXES.items() if runtime in runs]
        raise ConfigError(
            f"--runtime {runtime} runs exported files ({' or '.join(endings)}), and "
            f"{path} is none: export the checkpoint with tools/export.py first, or "
            "leave the option out"
        )
    require(cfg, "test_dataloader", "test_cfg", "test_evaluator")
    precision = precision or cfg.get("precision", "fp32")
    if precision != AUTO:
        check_precision(precision, get_device())
    say_warnings(check_data(cfg, "test"))
    checkpoint = load_checkpoint(path)
    check_work_dir(cfg.work_dir)
    cfg = testing_config(cfg)
    runner = build_runner(cfg)
    model, pruning = core_model(runner.model), None
    if deploy:
        _, pruning = load_pruned_model(cfg, checkpoint, path, runner=runner)
        before = "it was deployed before" if is_deployed(checkpoint) else None
        say(str(pruning or f"pruned nothing: {before or 'nothing is castled'}"))
        if pruning and pruning.was_on:
            say(
                "warning: the masks of this checkpoint have not decayed, so pruning "
                "changes the output; --no-deploy evaluates with the branch on"
            )
    else:
        load_model(cfg, checkpoint, path, model=model)
    roi_head = getattr(model, "roi_head", None)
    if isinstance(runner.model, BaseTTAModel) and getattr(roi_head, "with_mask", False):
        roi_head.mask_head = None  # mmdet merges boxes and refuses masks
    if precision == AUTO:
        precision = choose_precision(cfg, model, runner.test_dataloader.dataset)
    set_precision(model, precision)
    if precision != "fp32":
        say(f"layers compute in {precision}")
    with PartTimer(model) as timer:  # wrappers pass their own forward by
        metrics = run_test(runner)
    size = cfg.test_dataloader.get("batch_size", 1)
    parts = {part: seconds / size for part, seconds in timer.parts.items()}
    return Evaluation(metrics, timer.median / size, pruning, precision, parts)


# -- exported files --------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedEvaluation:
    """An evaluation of an exported file, whose ``metadata`` says what it holds.

    Seconds run from the preprocessed image to the prediction in the image's pixels.
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
    say_warnings(check_data(cfg, "test"))
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


# -- options of the command line -------------------------------------------------------

_FLIP = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
_TTA_MODELS = {
    "mmdet": dict(
        type="DetTTAModel",
        tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
    "mmpretrain": dict(type="mmpretrain.AverageClsScoreTTA"),
    "mmseg": dict(type="SegTTAModel"),
}


def enable_tta(cfg: Config) -> None:
    """Evaluate with test-time augmentation: the config's, or horizontal flips.

    mmdet merges boxes only, so masks are left out of its metric.
    """
    scope = cfg.get("default_scope")
    hook = cfg.get("default_hooks", {}).get("visualization") or {}
    if scope == "mmpretrain" and hook.get("enable"):
        raise ConfigError(
            "--tta: mmpretrain cannot draw augmented images; leave --show and "
            "--show-dir out, or evaluate without --tta"
        )
    if "tta_model" not in cfg:
        if scope not in _TTA_MODELS:
            raise ConfigError(
                f"--tta: no default for scope {scope!r}; put tta_model and "
                "tta_pipeline into the config"
            )
        cfg.tta_model = _TTA_MODELS[scope]
    dataset = next(datasets_of(cfg, "test"))
    if "tta_pipeline" not in cfg:
        pack = copy.deepcopy(dataset.pipeline[-1])
        keys = pack.get("meta_keys")
        if keys is not None:
            pack.meta_keys = (*keys, "flip", "flip_direction")
        steps = copy.deepcopy(dataset.pipeline[:-1])
        # mmseg flips predictions back, not the truth, which must not be flipped.
        truth = ["LoadAnnotations"] if scope == "mmseg" else []
        late = [step for step in steps if type_name(step["type"]) in truth]
        transforms = [_FLIP, *([step] for step in late), [pack]]
        cfg.tta_pipeline = [
            *(step for step in steps if step not in late),
            dict(type="TestTimeAug", transforms=transforms),
        ]
    dataset.pipeline = cfg.tta_pipeline
    module = model_spec(cfg)
    # The runner gives the config's own to the wrapper, which puts it into the model.
    cfg.data_preprocessor = module.get("data_preprocessor")
    cfg.model = ConfigDict(**cfg.tta_model, module=module)
    evaluators = cfg.test_evaluator
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if scope == "mmdet" and "segm" in (evaluator.get("metric") or []):
            print("--tta: mmdet merges boxes only; evaluating bbox without segm")
            evaluator.metric = ["bbox"]


def enable_drawing(
    cfg: Config, show: bool, show_dir: str | None, wait_time: float
) -> None:
    """Show each prediction in a window, or write it to a folder."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(
            "--show and --show-dir need a hook under default_hooks.visualization"
        )
    hook.update(show=show, wait_time=wait_time)
    scope = cfg.get("default_scope")
    if scope == "mmpretrain":
        hook.update(enable=True, out_dir=show_dir, interval=1)
        return
    hook.draw = True
    if show_dir is not None and scope == "mmdet":
        hook.test_out_dir = str(Path(show_dir).resolve())
    elif show_dir is not None and scope == "mmseg":
        cfg.visualizer.save_dir = show_dir


def enable_output(cfg: Config, out: str) -> None:
    """Write all predictions to a pickle file, as the toolboxes do."""
    check_writable(out, ".pkl", ".pickle")
    kind = "DumpDetResults" if cfg.get("default_scope") == "mmdet" else "DumpResults"
    old = cfg.test_evaluator
    old = old if isinstance(old, list) else [old]
    cfg.test_evaluator = [*old, dict(type=kind, out_file_path=out)]
