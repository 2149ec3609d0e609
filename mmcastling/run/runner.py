"""Build MMEngine's Runner the way the toolboxes' own scripts do, for all of them."""

from __future__ import annotations

import copy
import itertools
import os
import time

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmcastling.compat import fast_coco_eval
from mmcastling.compat.atomic_checkpoint_hook import whole_local_files
from mmcastling.registry import type_name
from mmcastling.run.distributed import setup_distributed

TRAINING_HOOKS = ("MaskDecayHook", "EMAHook")
TRAINING_SETTINGS = (
    *("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"),
    *("val_dataloader", "val_cfg", "val_evaluator", "auto_scale_lr"),
)

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


def drop_training_hooks(cfg: Config) -> None:
    """Remove the hooks that act on weights or masks while training, in place."""
    hooks = cfg.get("custom_hooks") or []
    cfg.custom_hooks = [
        hook for hook in hooks if type_name(hook["type"]) not in TRAINING_HOOKS
    ]


def testing_config(cfg: Config) -> Config:
    """A copy of a config that only tests: nothing of training is built."""
    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.resume = None, False
    drop_training_hooks(cfg)  # the weights in state_dict are averaged already
    cfg.update(dict.fromkeys(TRAINING_SETTINGS))
    for key in ("runner_type", "strategy"):  # of training; every rank holds all here
        cfg.pop(key, None)
    return cfg


def run_test(runner: Runner) -> dict[str, float]:
    """Run the test loop of a runner, and say what counts where the metric is COCO's.

    Returns:
        What the evaluator returned.
    """
    with fast_coco_eval(runner.test_evaluator.metrics) as library:
        if library:
            say(f"COCO evaluation by {library}")
        with whole_local_files():  # every process writes the metrics, to one file
            return runner.test()


def say(text: str) -> None:
    """Print, once where several processes run."""
    if is_main_process():
        print(text, flush=True)
