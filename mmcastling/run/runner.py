"""Build MMEngine's Runner for all toolboxes, in one process or in several.

MMEngine's launchers choose a GPU for each process and its models are wrapped for one.
Where no accelerator is found, the group of processes is started over gloo here instead,
before the Runner would.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Iterable

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmcastling.compat.atomic_checkpoint_hook import whole_local_files
from mmcastling.compat.coco_eval import fast_coco_eval
from mmcastling.compat.cpu_group import start_group_on_cpu
from mmcastling.errors import ConfigError
from mmcastling.registry import type_name

TRAINING_HOOKS = ("MaskDecayHook", "AttentionTeacherHook", "EMAHook")
TRAINING_SETTINGS = (
    *("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler"),
    *("val_dataloader", "val_cfg", "val_evaluator", "auto_scale_lr"),
)

_count = itertools.count()


def build_runner(cfg: Config) -> Runner:
    """Build a runner from a config, under a name that no other in the process has."""
    setup_distributed(cfg)
    if cfg.get("default_scope") == "mmpretrain":
        # mmpretrain's scripts, not its configs, ask for stacked batches.
        for split in ("train", "val", "test"):
            if loader := cfg.get(f"{split}_dataloader"):
                loader.setdefault("collate_fn", dict(type="default_collate"))
                workers = loader.get("num_workers", 0) > 0
                loader.setdefault("persistent_workers", workers)
    name = os.path.basename(os.path.normpath(cfg.work_dir))
    cfg.experiment_name = f"{name}_{time.strftime('%Y%m%d_%H%M%S')}_{next(_count)}"
    if cfg.get("visualizer"):  # mmdet's configs name theirs alike in every run
        cfg.visualizer.name = cfg.experiment_name
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    runner.register_hook(_CheckModelHook())
    return runner


_HEADS = ("bbox_head", "mask_head", "decode_head", "auxiliary_head", "head")


def check_trainable(model: nn.Module) -> None:
    """Check that some parameter is trained; ConfigError if all are frozen."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "no parameter of the model is trained: all are frozen, by frozen_stages or "
            "requires_grad. Leave some of it unfrozen"
        )


class _CheckModelHook(Hook):
    """Compares heads with the classes of the data, when both have been built.

    A label that the head lacks is an index error of the loss, and a label that the data
    lacks one of mmdet's metrics. And a model may be frozen whole.
    """

    def before_train(self, runner: Runner) -> None:
        check_trainable(runner.model)
        self._check(runner, runner.train_dataloader)
        if runner.val_loop is not None:
            self._check(runner, runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        self._check(runner, runner.test_dataloader)

    def _check(self, runner: Runner, loader: DataLoader) -> None:
        classes = getattr(loader.dataset, "metainfo", {}).get("classes")
        model = core_model(runner.model)
        # A detector that is asked in words has as many outputs as words fit.
        if not classes or hasattr(model, "language_model"):
            return
        for name, module in model.named_modules():
            parts = [part for part in name.split(".") if not part.isdecimal()]
            count = getattr(module, "num_classes", None)
            if (
                not isinstance(count, int)
                or count == len(classes)
                or parts[-1:] not in [[head] for head in _HEADS]
                or "rpn_head" in parts  # has objects and none
                or getattr(module, "class_agnostic", False)
            ):
                continue
            text = (
                f"model.{name}.num_classes is {count}, but the data has {len(classes)} "
                "classes: set them alike (the data's are metainfo.classes)"
            )
            if parts[-1] != "head" or count < len(classes):
                raise ConfigError(text)
            runner.logger.warning(text)


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
    """The metrics of a runner's test loop; says what counts where they are COCO's."""
    with fast_coco_eval(runner.test_evaluator.metrics) as library:
        if library:
            say(f"COCO evaluation by {library}")
        with whole_local_files():  # every process writes the metrics, to one file
            found = runner.test()
    # mmseg's are numbers of NumPy.
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in found.items()}


def say(text: str) -> None:
    """Print, once where several processes run."""
    if is_main_process():
        print(text, flush=True)


def say_warnings(warnings: Iterable[str]) -> None:
    """Print warnings, once where several processes run."""
    for text in warnings:
        say(f"warning: {text}")


# -- several processes -----------------------------------------------------------------

LAUNCHERS = {
    "none": (),
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST", "SLURM_LOCALID"),
    "mpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MASTER_ADDR",
    ),
}
"""Launchers, and the environment variables by which each tells a process its place."""


def is_first_process(cfg: Config) -> bool:
    """Whether this is the first of a config's processes, before they have met."""
    names = LAUNCHERS.get(cfg.get("launcher") or "none", ())
    return not names or os.environ.get(names[0], "0") == "0"


HOW_TO_START = {
    "pytorch": "start it with tools/dist_train.sh, tools/dist_test.sh or torchrun",
    "slurm": "start it with tools/slurm_train.sh, tools/slurm_test.sh or srun",
    "mpi": "start it with mpirun, MASTER_ADDR set to the address of the first machine",
}

_SHARDED_WRAPPERS = {
    "OptimWrapper": "ShardedOptimWrapper",
    "AmpOptimWrapper": "DeviceAmpOptimWrapper",
    "ShardedOptimWrapper": "ShardedOptimWrapper",
    "DeviceAmpOptimWrapper": "DeviceAmpOptimWrapper",
}

_LOCAL_RANK = {"slurm": "SLURM_LOCALID", "mpi": "OMPI_COMM_WORLD_LOCAL_RANK"}


def setup_distributed(cfg: Config) -> None:
    """Check what the config's launcher needs; without a GPU, start its process group.

    With an accelerator, MMEngine's Runner does it all. Without one, the group is
    started here with gloo, and the config, which is changed in place, tells the model's
    wrapper to leave it on the CPU. What cannot work is a :class:`ConfigError`.
    """
    launcher = cfg.get("launcher") or "none"
    _check_launcher(launcher)
    if is_sharded(cfg):
        _prepare_sharded(cfg, launcher)
    if launcher == "none":
        return
    if get_device() != "cpu":
        _check_gpu(launcher)
        return
    if not is_distributed():
        start_group_on_cpu(launcher, **cfg.get("env_cfg", {}).get("dist_cfg", {}))
    _wrap_on_cpu(cfg)


def is_sharded(cfg: Config) -> bool:
    """Whether a config trains with MMEngine's ``FSDPStrategy`` or ours."""
    sharding = ("FSDPStrategy", "ResumableFSDPStrategy")
    return (
        cfg.get("runner_type") == "FlexibleRunner"
        and type_name((cfg.get("strategy") or {}).get("type", "")) in sharding
    )


def _prepare_sharded(cfg: Config, launcher: str) -> None:
    if launcher == "none":
        raise ConfigError(
            "FSDPStrategy shards a model over several processes: start it with "
            "tools/dist_train.sh or tools/slurm_train.sh"
        )
    if any("EMAHook" in str(hook["type"]) for hook in cfg.get("custom_hooks") or []):
        raise ConfigError(
            "EMAHook cannot average a model that FSDPStrategy shards: remove one of "
            "the two"
        )
    cfg.strategy["type"] = "mmcastling.ResumableFSDPStrategy"
    wrapper = cfg.get("optim_wrapper")
    if wrapper is None:
        return
    name = type_name(wrapper.get("type", "OptimWrapper"))
    if name not in _SHARDED_WRAPPERS:
        raise ConfigError(
            f"{name} cannot clip the gradients that FSDPStrategy shards: use an "
            f"optim_wrapper of type {list(_SHARDED_WRAPPERS)}"
        )
    wrapper["type"] = f"mmcastling.{_SHARDED_WRAPPERS[name]}"
    if "Amp" in name:
        wrapper.setdefault("use_fsdp", True)


def _check_launcher(launcher: str) -> None:
    if launcher not in LAUNCHERS:
        raise ConfigError(
            f"launcher {launcher!r} is not known: choose one of {list(LAUNCHERS)}"
        )
    if launcher == "none":
        size = os.environ.get("WORLD_SIZE", "1")
        if "TORCHELASTIC_RUN_ID" in os.environ and size != "1":
            raise ConfigError(
                f"torchrun started {size} processes, but --launcher is none, so each "
                "would do the whole work: add --launcher pytorch"
            )
        return
    if missing := [name for name in LAUNCHERS[launcher] if name not in os.environ]:
        raise ConfigError(
            f"--launcher {launcher}: the environment lacks {', '.join(missing)}, so "
            f"this process was not started by it: {HOW_TO_START[launcher]}, or leave "
            "--launcher out for a single process"
        )


def _check_gpu(launcher: str) -> None:
    local_rank = int(os.environ[_LOCAL_RANK.get(launcher, "LOCAL_RANK")])
    found = torch.cuda.device_count()
    if get_device() == "cuda" and local_rank >= found:
        raise ConfigError(
            f"process {local_rank + 1} of this machine has no GPU: {found} were found "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')})."
            f" Start at most {found} processes per machine"
        )


def _wrap_on_cpu(cfg: Config) -> None:
    """Keep MMEngine from binding the wrapped model to a GPU's number."""
    ddp = dict(type="MMDistributedDataParallel", broadcast_buffers=False)
    if cfg.get("runner_type") == "FlexibleRunner":
        if cfg.get("strategy") is None:
            cfg.strategy = dict(type="DDPStrategy")
        default, device = ddp, dict(device_ids=None)
        if is_sharded(cfg):
            default = dict(type="MMFullyShardedDataParallel")
            device = dict(device_id="cpu")
        wrapper = cfg.strategy.get("model_wrapper") or {}
        cfg.strategy.model_wrapper = {**default, **wrapper, **device}
        return
    ddp["find_unused_parameters"] = cfg.get("find_unused_parameters", False)
    wrapper = cfg.get("model_wrapper_cfg") or ddp
    cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}
