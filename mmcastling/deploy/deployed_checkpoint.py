"""Deployed checkpoints: ``meta`` and ``state_dict`` of plain values, nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmcastling.checkpoint import weights_of, with_metadata
from mmcastling.errors import CheckpointError
from mmcastling.version import __version__

DEPLOY_META_KEY = "deploy"
"""Whether a checkpoint's ``meta`` says that it has been deployed."""


def is_deployed(checkpoint: dict[str, Any]) -> bool:
    """Whether a loaded checkpoint is one that the converter wrote."""
    meta = checkpoint.get("meta")
    return isinstance(meta, dict) and bool(meta.get(DEPLOY_META_KEY))


def select_weights(checkpoint: dict[str, Any], ema: bool | None) -> dict[str, Tensor]:
    """The weights to deploy.

    MMEngine's EMAHook saves the averaged weights as ``state_dict`` and the raw ones as
    ``ema_state_dict``, so the averaged ones are what is deployed anyway.

    Args:
        checkpoint: A loaded training checkpoint.
        ema: True demands averaged weights, False takes the raw ones, None takes
            ``state_dict`` whatever it is.

    Raises:
        CheckpointError: If averaged weights are asked for and there are none.
    """
    weights = weights_of(checkpoint)
    raw = checkpoint.get("ema_state_dict")
    if ema and raw is None:
        raise CheckpointError(
            "--ema was given, but the checkpoint has no averaged weights: train with "
            "custom_hooks=[dict(type='EMAHook')], or leave --ema out"
        )
    if ema is False and raw is not None:
        prefix = "module."
        raw = {k.removeprefix(prefix): v for k, v in raw.items() if prefix in k[:7]}
        weights = with_metadata({**weights, **raw}, weights)
    return weights


def deploy_checkpoint(
    model: nn.Module, training_meta: dict[str, Any], **facts: Any
) -> dict[str, Any]:
    """What is written for a deployed model.

    Args:
        model: The pruned model.
        training_meta: ``meta`` of the training checkpoint; the data set's metainfo and
            the place in training are kept.
        **facts: Further plain values for ``meta``.
    """
    kept = {
        key: training_meta[key]
        for key in ("dataset_meta", "epoch", "iter")
        if key in training_meta
    }
    meta = {**kept, **facts, DEPLOY_META_KEY: True, "mmcastling_version": __version__}
    state = model.state_dict()
    weights = {name: value.detach().cpu().clone() for name, value in state.items()}
    return {"meta": _plain(meta), "state_dict": with_metadata(weights, state)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)
