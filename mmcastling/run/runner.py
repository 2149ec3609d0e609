"""Build MMEngine's Runner the way the toolboxes' own scripts do, for all of them."""

from __future__ import annotations

import itertools
import os
import time

from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmcastling.run.distributed import setup_distributed

_count = itertools.count()


def build_runner(cfg: Config) -> Runner:
    """Build a runner from a config, under a name that no other in the process has.

    Raises:
        ConfigError: If the config's launcher cannot work here; see
            :func:`mmcastling.run.distributed.setup_distributed`.
    """
    setup_distributed(cfg)
    if cfg.get("default_scope") == "mmpretrain":
        _set_classification_loaders(cfg)
    name = os.path.basename(os.path.normpath(cfg.work_dir))
    cfg.experiment_name = f"{name}_{time.strftime('%Y%m%d_%H%M%S')}_{next(_count)}"
    if cfg.get("visualizer"):  # mmdet's configs name theirs alike in every run
        cfg.visualizer.name = cfg.experiment_name
    if "runner_type" in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)


def _set_classification_loaders(cfg: Config) -> None:
    # mmpretrain's scripts, not its configs, ask for stacked batches.
    for split in ("train", "val", "test"):
        if loader := cfg.get(f"{split}_dataloader"):
            loader.setdefault("collate_fn", dict(type="default_collate"))
            workers = loader.get("num_workers", 0) > 0
            loader.setdefault("persistent_workers", workers)


def core_model(model: nn.Module) -> nn.Module:
    """The model that holds the weights, inside distributed and test-time wrappers."""
    while is_model_wrapper(model) or (
        isinstance(getattr(model, "module", None), nn.Module)
        and not hasattr(model, "backbone")
    ):
        model = model.module
    return model
