"""Where training starts: anew, from weights, or where an earlier run stopped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmcastling.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    check_weights_fit,
    load_checkpoint,
)
from mmcastling.deploy import is_deployed
from mmcastling.run.load import build_model

LAST_CHECKPOINT = "last_checkpoint"
"""The file in a work directory that names its newest checkpoint."""

_TRAINING_STATE = ("optimizer", "message_hub", "meta")


@dataclass
class Start:
    """A checkpoint to start from, and what was wrong with newer ones."""

    source: str
    checkpoint: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def set_resume(cfg: Config, resume: str | None) -> None:
    """Ask for a resume from a checkpoint, or from the latest one with ``'auto'``.

    Args:
        cfg: Changed in place; :func:`settle_start` checks what is asked for.
        resume: A path, ``'auto'``, or None for no resume.
    """
    if resume is None:
        return
    cfg.resume = True
    cfg.load_from = None if resume == "auto" else resume


def settle_start(cfg: Config) -> list[str]:
    """Find and check the checkpoint that training resumes or starts from.

    Settles ``resume`` and ``load_from`` of the config: a resume without a path gets the
    newest checkpoint in the work directory that is whole, or becomes a start anew where
    there is none. A resumed run without a seed of its own gets that of the checkpoint.
    Nothing is written.

    Args:
        cfg: The config of a run; changed in place.

    Returns:
        What to warn of once there is a log.

    Raises:
        CheckpointError: If what is to be resumed or loaded cannot be.
    """
    resume, source = cfg.get("resume"), cfg.get("load_from")
    if source is not None:
        if "://" in str(source):  # MMEngine downloads it
            return []
        start = Start(str(source), load_checkpoint(source))
    elif resume:
        start = newest_usable(cfg.work_dir)
        if start is None:
            cfg.resume = False
            return []
        cfg.load_from = start.source
    else:
        return []
    if resume:
        check_resumable(start.checkpoint, start.source)
        check_weights_fit(build_model(cfg), start.checkpoint, start.source)
        _adopt_seed(cfg, start.checkpoint)
    return start.warnings


def newest_usable(work_dir: str) -> Start | None:
    """The newest checkpoint of a work directory from which training can go on.

    That is the one which ``last_checkpoint`` names. If it is damaged or missing, the
    others in the same folder and in the work directory are tried, newest first, those
    without training state left out.

    Args:
        work_dir: May be missing.

    Returns:
        The checkpoint, or None if there has been none.

    Raises:
        CheckpointError: If none of those that are there can be used, or one asks to run
            code.
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
        if path != named and not _has_training_state(checkpoint):
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
    """Raise unless a checkpoint holds the state of a training.

    Args:
        checkpoint: A loaded checkpoint.
        source: Its path, for the message.

    Raises:
        CheckpointError: If it has been deployed, or holds no training state.
    """
    if is_deployed(checkpoint):
        raise CheckpointError(
            f"checkpoint {source} has been deployed: its auxiliary branch and training "
            "state are gone, so there is nothing to resume. Resume from the training "
            "checkpoint it was converted from, or finetune with "
            "--cfg-options load_from=..."
        )
    missing = [key for key in _TRAINING_STATE if not checkpoint.get(key)]
    if missing:
        raise CheckpointError(
            f"checkpoint {source} holds no training state ({', '.join(missing)} "
            "missing): it cannot be resumed; finetune from it with --cfg-options "
            "load_from=..."
        )


def _has_training_state(checkpoint: dict[str, Any]) -> bool:
    return not is_deployed(checkpoint) and all(map(checkpoint.get, _TRAINING_STATE))


def _named_last(work_dir: Path) -> Path | None:
    pointer = work_dir / LAST_CHECKPOINT
    if not pointer.is_file():
        return None
    name = pointer.read_text(errors="replace").strip()
    if not name:  # cut short by a kill
        return None
    # A work directory that was moved is named by where it was.
    here = work_dir / Path(name).name
    return here if here.is_file() and not Path(name).is_file() else Path(name)


def _age(path: Path) -> tuple[int, list[int]]:
    """Sorts by time and, of files copied together, by the numbers in the names."""
    numbers = [int(digits) for digits in re.findall(r"\d+", path.stem)]
    return path.stat().st_mtime_ns, numbers


def _adopt_seed(cfg: Config, checkpoint: dict[str, Any]) -> None:
    # MMEngine takes it over too, but after the order of the data has been drawn.
    randomness = cfg.get("randomness") or {}
    seed = checkpoint["meta"].get("seed")
    if randomness.get("seed") is None and seed is not None:
        cfg.randomness = {**randomness, "seed": seed}
