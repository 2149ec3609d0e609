"""The config of a deployed model: the training config without what training needs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from mmcastling.registry import type_name

TRAINING_HOOKS = ("MaskDecayHook", "EMAHook")


def drop_training_hooks(cfg: Config) -> None:
    """Remove the hooks that act on weights or masks while training, in place."""
    hooks = cfg.get("custom_hooks") or []
    cfg.custom_hooks = [
        hook for hook in hooks if type_name(hook["type"]) not in TRAINING_HOOKS
    ]


def deploy_config(cfg: Config) -> Config:
    """A copy of a config whose model is built pruned.

    Sets ``deploy=True`` wherever a registered module takes it, puts what a class that
    offers ``deployed_config(config)`` becomes in its place, and removes the training
    hooks and what names a checkpoint to start from.

    Args:
        cfg: The config of training; its default scope must be initialised.
    """
    cfg = copy.deepcopy(cfg)
    _set_deploy(cfg.model)
    drop_training_hooks(cfg)
    cfg.load_from = None
    cfg.resume = False
    return cfg


def _set_deploy(node: Any) -> None:
    if isinstance(node, dict):
        kind = node.get("type")
        if kind is not None:
            kind = MODELS.get(kind) if isinstance(kind, str) else kind
            if callable(deployed := getattr(kind, "deployed_config", None)):
                kept = deployed(dict(node))
                node.clear()
                node.update(kept)
                kind = MODELS.get(node["type"])
            if callable(kind) and "deploy" in inspect.signature(kind).parameters:
                node["deploy"] = True
                node.pop("init_cfg", None)
        for value in node.values():
            _set_deploy(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _set_deploy(value)
