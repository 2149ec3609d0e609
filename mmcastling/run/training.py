"""Train from a config: what ``tools/train.py`` does."""

from __future__ import annotations

from mmengine.config import Config
from torch import nn

from mmcastling.compat.safe_loading import safe_mmengine_loading
from mmcastling.run.config import check_data, check_work_dir, require
from mmcastling.run.resume import settle_start
from mmcastling.run.runner import build_runner


def train(cfg: Config) -> nn.Module:
    """Train.

    Args:
        cfg: A config from :func:`mmcastling.run.load_config`.

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
    warnings = settle_start(cfg)
    check_work_dir(cfg.work_dir)
    runner = build_runner(cfg)
    for warning in warnings:
        runner.logger.warning(warning)
    with safe_mmengine_loading():
        return runner.train()
