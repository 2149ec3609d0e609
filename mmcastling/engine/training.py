"""Train from a config: what ``tools/train.py`` does."""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint
from torch import nn

from mmcastling.checkpoint import (
    CheckpointError,
    check_weights_fit,
    load_checkpoint,
    safe_mmengine_loading,
)
from mmcastling.deploy import is_deployed
from mmcastling.engine.config import check_data, check_work_dir, require
from mmcastling.engine.errors import ConfigError
from mmcastling.engine.runner import build_runner, core_model


def enable_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to automatic mixed precision.

    Raises:
        ConfigError: If there is no device on which MMEngine offers it.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--amp needs a CUDA device and none was found: train without")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def enable_auto_scale_lr(cfg: Config) -> None:
    """Let the learning rate follow the batch size by the linear rule.

    Raises:
        ConfigError: If the config does not say for which batch size it was written.
    """
    if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
        raise ConfigError(
            "--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the "
            "config"
        )
    cfg.auto_scale_lr.enable = True


def set_resume(cfg: Config, resume: str | None) -> None:
    """Ask for a resume from a checkpoint, or from the latest one with ``'auto'``.

    Raises:
        CheckpointError: If the path does not exist.
    """
    if resume is None:
        return
    cfg.resume = True
    cfg.load_from = None if resume == "auto" else resume


def train(cfg: Config) -> nn.Module:
    """Train.

    Args:
        cfg: A config from :func:`mmcastling.engine.load_config`.

    Returns:
        The trained model.

    Raises:
        ConfigError: If the config has nothing to train, or the work directory cannot
            be written.
        DatasetError, CocoFormatError: If the data is missing or malformed.
        CheckpointError: If what to resume or start from cannot be used.
    """
    require(cfg, "train_dataloader", "train_cfg", "optim_wrapper")
    check_data(cfg, "train", "val")
    source = cfg.get("load_from")
    if cfg.get("resume") and source is None:
        source = find_latest_checkpoint(cfg.work_dir)
    checkpoint = None
    if source is not None and "://" not in str(source):
        checkpoint = load_checkpoint(source)
    if checkpoint is not None and cfg.get("resume"):
        _check_resumable(checkpoint, source)
    check_work_dir(cfg.work_dir)
    runner = build_runner(cfg)
    if checkpoint is not None and cfg.get("resume"):
        check_weights_fit(core_model(runner.model), checkpoint, source)
    del checkpoint
    with safe_mmengine_loading():
        return runner.train()


def _check_resumable(checkpoint: dict, source: str) -> None:
    if is_deployed(checkpoint):
        raise CheckpointError(
            f"checkpoint {source} has been deployed: its auxiliary branch and training "
            "state are gone, so there is nothing to resume. Resume from the training "
            "checkpoint it was converted from, or finetune with "
            "--cfg-options load_from=..."
        )
    missing = [
        key for key in ("optimizer", "message_hub", "meta") if not checkpoint.get(key)
    ]
    if missing:
        raise CheckpointError(
            f"checkpoint {source} holds no training state ({', '.join(missing)} "
            "missing): it cannot be resumed; finetune from it with --cfg-options "
            "load_from=..."
        )
