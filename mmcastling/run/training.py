"""Train, anew or from where an earlier run stopped: what ``tools/train.py`` does."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmcastling.checkpoint import check_weights_fit, load_checkpoint
from mmcastling.compat.safe_loading import safe_mmengine_loading
from mmcastling.deploy import is_deployed
from mmcastling.errors import CheckpointError, ConfigError, DamagedCheckpointError
from mmcastling.models.pretrained import check_start, read_checkpoint
from mmcastling.registry import type_name
from mmcastling.run.config import check_data, require
from mmcastling.run.load import build_model
from mmcastling.run.runner import (
    build_runner,
    check_trainable,
    is_first_process,
    is_sharded,
)
from mmcastling.run.work_dir import check_work_dir, claimed_work_dir
from mmcastling.train.amp import DTYPES

CPU_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Environment variables that training on a CPU profits from, for a process to start.

glibc returns large buffers to the system after every step and faults them in anew at
the next, so they are kept; and threads that spin while they wait stall each other where
something else runs. ``tools/cpu_environment.sh`` sets the same for launch scripts."""

LAST_CHECKPOINT = "last_checkpoint"
"""The file in a work directory that names its newest checkpoint."""

_TRAINING_STATE = ("optimizer", "message_hub", "meta")
_REPLACED = ("OptimWrapper", "AmpOptimWrapper", "DeviceAmpOptimWrapper")


def train(
    cfg: Config,
    *,
    resume: str | None = None,
    amp: bool | str | None = None,
    auto_scale_lr: bool = False,
) -> nn.Module:
    """Train, and return the trained model.

    Args:
        cfg: A config from :func:`mmcastling.run.load_config`; changed in place.
        resume: A checkpoint to go on from, or ``'auto'`` for the newest whole one in
            the work directory, and where there is none for a start from the config's
            ``load_from``. Defaults to None (as the config says).
        amp: Automatic mixed precision in ``'float16'`` or ``'bfloat16'``, or with True
            in the config's dtype or else the device's usual one. Defaults to None (as
            the config says).
        auto_scale_lr: Let the learning rate follow the batch size by the linear rule.

    Raises:
        UserError: If config, data, work directory or what to start from cannot be used.
    """
    start = None
    if resume is not None:
        start = cfg.get("load_from")
        cfg.resume = True
        cfg.load_from = None if resume == "auto" else resume
    if amp:
        enable_amp(cfg, None if amp is True else amp)
    if auto_scale_lr:
        enable_auto_scale_lr(cfg)
    require(cfg, "train_dataloader", "train_cfg", "optim_wrapper")
    warnings = check_data(cfg, "train", "val") + settle_start(cfg, start)
    check_work_dir(cfg.work_dir)
    with claimed_work_dir(cfg.work_dir) if is_first_process(cfg) else nullcontext():
        runner = build_runner(cfg)
        if isinstance(runner.model, nn.Module):  # strategies build it when they train
            check_trainable(runner.model)
        for warning in warnings:
            runner.logger.warning(warning)
        with safe_mmengine_loading():
            return runner.train()


# -- options ---------------------------------------------------------------------------


def enable_amp(cfg: Config, dtype: str | None = None) -> None:
    """Switch a config's optimizer wrapper to automatic mixed precision, in place."""
    require(cfg, "optim_wrapper")
    wrapper = cfg.optim_wrapper
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"--amp {dtype!r} is not a half precision: choose one of {list(DTYPES)}"
        )
    name = type_name(wrapper.get("type", "OptimWrapper"))
    if name not in _REPLACED:
        raise ConfigError(
            f"--amp changes an optim_wrapper of type {_REPLACED}, the config has "
            f"{name!r}: set the precision there, or train without --amp"
        )
    wrapper.type = "mmcastling.DeviceAmpOptimWrapper"
    if dtype is not None:
        wrapper.dtype = dtype
    if is_sharded(cfg):
        wrapper.setdefault("use_fsdp", True)


def enable_auto_scale_lr(cfg: Config) -> None:
    """Let the learning rate follow the batch size by the linear rule, in place.

    A batch is what one step of the optimizer sees: images per process, times processes,
    times ``accumulative_counts``. MMEngine counts the first two, so the reference is
    divided by the third.
    """
    base = (cfg.get("auto_scale_lr") or {}).get("base_batch_size")
    if base is None:
        raise ConfigError(
            "--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the "
            "config"
        )
    if not isinstance(base, (int, float)) or base <= 0:
        raise ConfigError(
            f"--auto-scale-lr: base_batch_size {base!r} must be a positive number of "
            "images"
        )
    if "batch_size" not in (cfg.get("train_dataloader") or {}):
        raise ConfigError(
            "--auto-scale-lr needs train_dataloader=dict(batch_size=...) in the config"
        )
    counts = (cfg.get("optim_wrapper") or {}).get("accumulative_counts", 1)
    if counts > 1:
        cfg.auto_scale_lr.base_batch_size = base / counts
    cfg.auto_scale_lr.enable = True


# -- where training starts -------------------------------------------------------------


@dataclass
class Start:
    """A checkpoint to start from, and what was wrong with newer ones."""

    source: str
    checkpoint: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def settle_start(cfg: Config, fresh: str | None = None) -> list[str]:
    """Find and check the checkpoint that training resumes or starts from.

    Settles ``resume`` and ``load_from`` of the config: a resume without a path gets the
    newest checkpoint in the work directory that is whole, or becomes a start anew, from
    ``fresh``, where there is none. A resumed run without a seed of its own gets that of
    the checkpoint.
    What is resumed fits the model whole; what is only started from fills its backbone
    as far as ``init_cfg`` must (:func:`mmcastling.models.pretrained.check_start`).
    Nothing is written. What comes back are warnings, for when there is a log.
    """
    resume, source = cfg.get("resume"), cfg.get("load_from")
    if not (source or resume):
        return []
    if source:
        start = Start(str(source), read_checkpoint(source))
    else:
        start = newest_usable(cfg.work_dir)
    if start is None:
        cfg.resume, cfg.load_from = False, fresh
        return settle_start(cfg)
    cfg.load_from = start.source
    if resume:
        check_resumable(start.checkpoint, start.source)
        check_weights_fit(build_model(cfg), start.checkpoint, start.source)
        _adopt_seed(cfg, start.checkpoint)
    else:
        check_start(build_model(cfg), start.checkpoint, start.source)
    return start.warnings


def newest_usable(work_dir: str) -> Start | None:
    """The newest checkpoint of a work directory from which training can go on.

    That is the one which ``last_checkpoint`` names. If it is damaged or missing, the
    others in the same folder and in the work directory are tried, newest first, those
    without training state left out. None where there are none; an error where none can
    be used, or one asks to run code.
    """
    named = _named_last(Path(work_dir))
    folders = {Path(work_dir), named.parent if named else Path(work_dir)}
    found = {path.resolve(): path for f in folders for path in f.glob("*.pth")}
    if named:
        found.pop(named.resolve(), None)
    others = sorted(found.values(), key=_age, reverse=True)
    problems: list[str] = []
    for path in [named, *others] if named else others:
        if path == named and not path.is_file():
            problems.append(
                f"checkpoint {path}, which {LAST_CHECKPOINT} names, is missing"
            )
            continue
        try:
            checkpoint = load_checkpoint(path)
        except DamagedCheckpointError as error:
            problems.append(str(error))
            continue
        if path != named and (is_deployed(checkpoint) or _missing_state(checkpoint)):
            continue  # the best one, or one that was converted
        warnings = [f"{text}. Resuming from {path} instead" for text in problems]
        return Start(str(path), checkpoint, warnings)
    if problems:
        raise CheckpointError(
            f"there is no checkpoint in {work_dir} to resume from: "
            f"{'; '.join(problems)}. Start anew without --resume, or give a path"
        )
    return None


def check_resumable(checkpoint: dict[str, Any], source: str) -> None:
    """Raise unless a checkpoint, of this source, holds the state of a training."""
    if is_deployed(checkpoint):
        raise CheckpointError(
            f"checkpoint {source} has been deployed: its auxiliary branch and training "
            "state are gone, so there is nothing to resume. Resume from the training "
            "checkpoint it was converted from, or finetune with "
            "--cfg-options load_from=..."
        )
    if missing := _missing_state(checkpoint):
        raise CheckpointError(
            f"checkpoint {source} holds no training state ({', '.join(missing)} "
            "missing): it cannot be resumed; finetune from it with --cfg-options "
            "load_from=..."
        )


def _missing_state(checkpoint: dict[str, Any]) -> list[str]:
    return [key for key in _TRAINING_STATE if not checkpoint.get(key)]


def _named_last(work_dir: Path) -> Path | None:
    pointer = work_dir / LAST_CHECKPOINT
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if not name:  # perhaps cut short by a kill
        return None
    # One that was moved or copied is named by where it was: a copy has its own.
    here = work_dir / Path(name).name
    return here if here.is_file() else Path(name)


def _age(path: Path) -> tuple[int, list[int]]:
    """Sorts by time and, of files copied together, by the numbers in the names."""
    numbers = [int(digits) for digits in re.findall(r"\d+", path.stem)]
    return path.stat().st_mtime_ns, numbers


def _adopt_seed(cfg: Config, checkpoint: dict[str, Any]) -> None:
    # MMEngine takes it over too, but after the order of the data has been drawn.
    randomness = cfg.get("randomness") or {}
    if randomness.get("seed") is None:
        cfg.randomness = {**randomness, "seed": checkpoint["meta"].get("seed")}
