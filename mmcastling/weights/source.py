"""Read the tensors of a checkpoint, wherever in the file they are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcastling.checkpoint import (
    load_checkpoint,
    read_safetensors,
    without_wrappers,
)
from mmcastling.errors import CheckpointError

Weights = dict[str, Tensor]
"""Tensors by name, as one dictionary of a checkpoint holds them."""

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def read_source(path: Path) -> dict[str, Weights]:
    """Read a checkpoint of any library, ``.safetensors`` too, without unpickling code.

    Returns the dictionaries of tensors in it by their dotted path: ``''`` for the top
    level, ``'model'``, ``'teacher'`` and so on. Raises CheckpointError if the file is
    missing, damaged, holds code or no tensors.
    """
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in _SUFFIXES)
        raise CheckpointError(
            f"source {path} is a folder: name the file of weights inside it"
            + (f", such as {files[0]}" if files else "")
        )
    if path.suffix == ".safetensors":
        containers = {"": read_safetensors(path)}
    else:
        # Training scripts of DeiT, MAE, DINO and timm save their arguments beside the
        # weights; a Namespace only holds values, which must be safe themselves.
        with torch.serialization.safe_globals([argparse.Namespace]):
            containers = dict(_containers(load_checkpoint(path)))
    if not any(containers.values()):
        raise CheckpointError(f"source {path} holds no tensors")
    return containers


def _containers(node: dict[Any, Any], path: str = "") -> Iterator[tuple[str, Weights]]:
    named = {name: value for name, value in node.items() if isinstance(name, str)}
    tensors = {
        without_wrappers(n): v.detach()
        for n, v in named.items()
        if isinstance(v, Tensor)
    }
    if tensors:
        yield path, tensors
    for name, value in named.items():
        if isinstance(value, dict):
            yield from _containers(value, f"{path}.{name}" if path else name)
