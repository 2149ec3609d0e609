"""Evaluate a checkpoint, deployed by default: what ``tools/test.py`` does."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.model import BaseTTAModel
from mmengine.runner import Runner
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmcastling.analysis import ForwardTimer, count_macs
from mmcastling.checkpoint import load_checkpoint, load_weights
from mmcastling.deploy import (
    check_precision,
    drop_training_hooks,
    is_deployed,
    set_precision,
)
from mmcastling.engine.config import check_data, check_work_dir, datasets_of, require
from mmcastling.engine.errors import ConfigError
from mmcastling.engine.runner import build_runner, core_model
from mmcastling.protocol import (
    castling_modules,
    restore_mask,
    set_mask,
    switch_to_deploy,
)


@dataclass(frozen=True)
class Pruning:
    """What deploying removed.

    Attributes:
        attentions: Attentions whose auxiliary branch was pruned.
        was_on: Whether the branch still contributed, so that the output changes.
        shape: ``(H, W)`` at which the backbone's cost was counted.
        macs_training: MACs of the backbone with the branch on, for one image.
        macs_deployed: MACs of the deployed backbone, for one image.
    """

    attentions: int
    was_on: bool
    shape: tuple[int, int]
    macs_training: int
    macs_deployed: int

    def __str__(self) -> str:
        height, width = self.shape
        saved = 1.0 - self.macs_deployed / self.macs_training
        text = (
            f"pruned the auxiliary softmax branch of {self.attentions} attentions: the "
            f"backbone at {height}x{width} takes {self.macs_deployed / 1e9:.3f} GMACs, "
            f"{self.macs_training / 1e9:.3f} with the branch on (-{saved:.1%})"
        )
        if self.was_on:
            text += (
                "\nwarning: the masks of this checkpoint have not decayed, so pruning "
                "changes the output; --no-deploy evaluates with the branch on"
            )
        return text


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: What the config's evaluator returned.
        seconds_per_image: Median forward time over batches, divided by their size;
            of one view with test-time augmentation.
        pruning: What deploying removed, or None where nothing was.
        precision: What the layers computed in.
    """

    metrics: dict[str, float]
    seconds_per_image: float
    pruning: Pruning | None
    precision: str = "fp32"


def evaluate(
    cfg: Config,
    source: str | os.PathLike[str],
    *,
    deploy: bool = True,
    precision: str | None = None,
) -> Evaluation:
    """Evaluate a checkpoint on the config's test set.

    Args:
        cfg: A config from :func:`mmcastling.engine.load_config`.
        source: A training or deployed checkpoint of that config.
        deploy: Prune before evaluating, and say what that saved. Defaults to True.
        precision: What layers compute in, see :func:`mmcastling.deploy.set_precision`.
            Defaults to None (the config's ``precision``, which the converter writes,
            or ``'fp32'``).

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit.
        DatasetError, CocoFormatError: If the data is missing or malformed.
        ConfigError: If the work directory cannot be written.
        ValueError, RuntimeError: If the precision is not known or not supported, or the
            model has not been pruned for it.
    """
    require(cfg, "test_dataloader", "test_cfg", "test_evaluator")
    precision = precision or cfg.get("precision", "fp32")
    check_precision(precision, get_device())
    check_data(cfg, "test")
    checkpoint = load_checkpoint(source)
    check_work_dir(cfg.work_dir)
    cfg = testing_config(cfg)
    runner = build_runner(cfg)
    model = core_model(runner.model)
    load_weights(model, checkpoint, str(source))
    restore_mask(model, checkpoint)
    if is_deployed(checkpoint):  # pruned, whatever the config says
        switch_to_deploy(model, inplace=True)
    if isinstance(runner.model, BaseTTAModel):
        _leave_out_masks(model)

    pruning = None
    if deploy:
        pruning = _deploy(runner, model)
        if is_main_process():
            print(pruning or _nothing_pruned(checkpoint), flush=True)
    set_precision(model, precision)
    if precision != "fp32" and is_main_process():
        print(f"layers compute in {precision}", flush=True)
    with ForwardTimer(model) as timer:  # wrappers pass their own forward by
        metrics = runner.test()
    batch_size = cfg.test_dataloader.get("batch_size", 1)
    return Evaluation(metrics, timer.median / batch_size, pruning, precision)


def testing_config(cfg: Config) -> Config:
    """A copy of a config that only tests: nothing of training is built."""
    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.resume = None, False
    drop_training_hooks(cfg)  # the weights in state_dict are averaged already
    for key in ("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"):
        cfg[key] = None
    for key in ("val_dataloader", "val_cfg", "val_evaluator"):
        cfg[key] = None
    cfg.auto_scale_lr = None
    for key in ("runner_type", "strategy"):  # of training; every rank holds all here
        cfg.pop(key, None)
    return cfg


def _leave_out_masks(model: nn.Module) -> None:
    # mmdet's test-time augmentation merges boxes and refuses predictions with masks.
    roi_head = getattr(model, "roi_head", None)
    if getattr(roi_head, "with_mask", False):
        roi_head.mask_head = None


def _nothing_pruned(checkpoint: dict[str, Any]) -> str:
    why = "it was deployed before" if is_deployed(checkpoint) else "nothing is castled"
    return f"pruned nothing: {why}"


def _deploy(runner: Runner, model: nn.Module) -> Pruning | None:
    modules = [module for _, module in castling_modules(model)]
    if not modules:
        switch_to_deploy(model, inplace=True)
        return None
    was_on = any(module.mask_is_on for module in modules)
    backbone = getattr(model, "backbone", model)
    shape = test_shape(runner, model)
    before = branch_on_macs(backbone, shape)
    switch_to_deploy(model, inplace=True)
    return Pruning(len(modules), was_on, shape, before, _macs(backbone, shape))


def test_shape(runner: Runner, model: nn.Module) -> tuple[int, int]:
    """``(H, W)`` of the first test image as the network sees it, padding included."""
    loader = runner.test_dataloader
    batch = loader.collate_fn([loader.dataset[0]])
    inputs = batch["inputs"]
    while isinstance(inputs, (list, tuple)) and isinstance(inputs[0], (list, tuple)):
        batch = {
            key: value[0] for key, value in batch.items()
        }  # test-time augmentation
        inputs = batch["inputs"]
    inputs = model.data_preprocessor(batch, False)["inputs"]
    height, width = inputs[0].shape[-2:]
    return int(height), int(width)


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

    Raises:
        ConfigError: If the toolbox has no default and the config none of its own, or
            cannot draw augmented images.
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
        late = [step for step in steps if scope == "mmseg" and _loads_truth(step)]
        transforms = [_FLIP, *([step] for step in late), [pack]]
        cfg.tta_pipeline = [
            *(step for step in steps if step not in late),
            dict(type="TestTimeAug", transforms=transforms),
        ]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    evaluators = cfg.test_evaluator
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if scope == "mmdet" and "segm" in (evaluator.get("metric") or []):
            print("--tta: mmdet merges boxes only; evaluating bbox without segm")
            evaluator.metric = ["bbox"]


def _loads_truth(step: dict[str, Any]) -> bool:
    return str(step["type"]).rpartition(".")[2] == "LoadAnnotations"


def enable_drawing(
    cfg: Config, show: bool, show_dir: str | None, wait_time: float
) -> None:
    """Show each prediction in a window, or write it to a folder.

    Raises:
        ConfigError: If the config has no visualization hook.
    """
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(
            "--show and --show-dir need a hook under default_hooks.visualization"
        )
    hook.update(show=show, wait_time=wait_time)
    if cfg.get("default_scope") == "mmpretrain":
        hook.update(enable=True, out_dir=show_dir, interval=1)
    else:
        hook.draw = True
    if show_dir is not None:
        if cfg.get("default_scope") == "mmdet":
            hook.test_out_dir = str(Path(show_dir).resolve())
        elif cfg.get("default_scope") == "mmseg":
            cfg.visualizer.save_dir = show_dir


def enable_output(cfg: Config, out: str) -> None:
    """Write all predictions to a pickle file, as the toolboxes do.

    Raises:
        ConfigError: If the name does not end in ``.pkl`` or the folder is missing.
    """
    if Path(out).suffix not in (".pkl", ".pickle"):
        raise ConfigError(f"--out {out}: predictions are pickled, end it in .pkl")
    if not Path(out).absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist, create it first")
    kind = "DumpDetResults" if cfg.get("default_scope") == "mmdet" else "DumpResults"
    evaluators = cfg.test_evaluator
    evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
    cfg.test_evaluator = [*evaluators, dict(type=kind, out_file_path=out)]
