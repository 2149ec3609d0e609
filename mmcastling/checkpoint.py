"""Checkpoints: read without running their code, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmcastling.attention.old_names import with_current_names
from mmcastling.errors import CheckpointError, DamagedCheckpointError
from mmcastling.files import remove_leftovers, write_atomically

_OF_PROGRAMS = re.compile(r"(^|/)(code/__torch__|archive_format$|serialized_)")
MOST_EXPANDED = 16
"""How many times the size of its file a checkpoint's tensors may have together. Several
names of one tensor count each; views that repeat a number reach any size."""
MOST_NESTED = 100
"""How deep dicts and lists of a checkpoint may lie in each other."""
MOST_VALUES = 10_000_000
"""How many values may be in a checkpoint, those that are there several times counted
each time."""

# Of torch.compile, of FullyShardedDataParallel and of its activation checkpoints.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
SAFE_GLOBALS: list[Any] = [
    slice,
    np.ndarray,
    np.dtype,
    _multiarray._reconstruct,
    _multiarray.scalar,
    *(type(np.dtype(kind)) for kind in (np.uint32, np.float64, np.int64)),
]
"""What a checkpoint may hold beside tensors and plain values, as torch names it.

MMEngine's training history is added when MMEngine is imported.
"""


def load_checkpoint(
    path: str | os.PathLike[str], map_location: Any = "cpu"
) -> dict[str, Any]:
    """Load a checkpoint from disk without unpickling code.

    Reads tensors, plain Python values, numpy arrays and, where MMEngine is imported,
    its training history; nothing else.

    Args:
        path: A local file.
        map_location: As in :func:`torch.load`. Defaults to ``'cpu'``.

    Raises:
        DamagedCheckpointError: If the file is truncated or is not a checkpoint.
        CheckpointError: If the file is missing, holds code, or claims to hold far more
            than its size.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: check the path")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"checkpoint {path} may not be read: check its mode")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_broken_archive(path):
            raise DamagedCheckpointError(_damaged(path)) from error
        reason = str(error).partition("GLOBAL ")[2].split(" was not")[0]
        if reason.startswith("mmengine.logging.history_buffer."):
            raise CheckpointError(
                f"checkpoint {path} was written by MMEngine, whose {reason} is needed "
                "to read it: import mmengine first (pip install onedl-mmengine)"
            ) from error
        what = f"the object {reason}" if reason else "something other than tensors"
        raise CheckpointError(
            f"checkpoint {path} is refused: it asks to run code or holds {what}, which "
            "a file of weights does not need. If you trust its origin, load it with "
            "its own library and save {'state_dict': model.state_dict()}"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever the parsers say of damaged bytes
        raise DamagedCheckpointError(_damaged(path)) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(checkpoint).__name__}, expected a dict "
            "with 'state_dict'"
        )
    _check_content(checkpoint, path)
    return checkpoint


def _check_archive(path: Path) -> None:
    """Refuse a program, and an archive whose members are larger than itself."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(_OF_PROGRAMS.search(name) for name in archive.namelist()):
            raise CheckpointError(
                f"checkpoint {path} is refused: it is a program of TorchScript or "
                "torch.export, which runs what its author wrote, and no weights. Give "
                "the checkpoint that it was made from"
            )
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > path.stat().st_size:
            raise CheckpointError(_too_large(path, f"unpacks to {unpacked:,} bytes"))


def _check_content(checkpoint: dict[str, Any], path: Path) -> None:
    """Refuse what claims little and expands to much, before anything walks over it."""
    most = MOST_EXPANDED * path.stat().st_size + 2**20
    total = count = 0
    levels: list[Iterator[Any]] = [iter([checkpoint])]
    while levels:
        value = next(levels[-1], levels)
        if value is levels:
            levels.pop()
            continue
        count += 1
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            levels.append(iter([*value, *value.values()]))
        elif isinstance(value, (list, tuple, set, frozenset)):
            levels.append(iter(value))
        if len(levels) > MOST_NESTED + 1:
            what = f"nests its values more than {MOST_NESTED} deep"
        elif total > most:
            what = f"claims tensors of more than {most:,} bytes, which repeat numbers"
        elif count > MOST_VALUES:
            what = f"claims more than {MOST_VALUES:,} values"
        else:
            continue
        raise CheckpointError(_too_large(path, what))


def _too_large(path: Path, what: str) -> str:
    return (
        f"checkpoint {path} is refused: it has {path.stat().st_size:,} bytes and "
        f"{what}, as no training writes. If you trust its origin, load it with its own "
        "library and save {'state_dict': model.state_dict()} with contiguous tensors"
    )


def _is_broken_archive(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return False
    try:
        return not zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def _damaged(path: Path) -> str:
    return (
        f"checkpoint {path} ({path.stat().st_size} bytes) is truncated or not a torch "
        "checkpoint: copy or download it again, or use an earlier one"
    )


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file by name."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: check the path")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"reading {path} needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} ({path.stat().st_size} bytes) is truncated or not a "
            f"safetensors file ({error}): copy or download it again"
        ) from error


def weights_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, without what wrappers add to names.

    That is ``module.`` at the front, of distributed models, and at any place what
    compiled, sharded and checkpointed modules add (``_orig_mod.``).

    Raises:
        CheckpointError: If there are no tensors in it, or two come to have one name.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    tensors = isinstance(weights, dict) and any(
        isinstance(value, torch.Tensor) for value in weights.values()
    )
    if not tensors:
        raise CheckpointError(
            f"the checkpoint has no weights: expected a 'state_dict' of tensors, found "
            f"the keys {sorted(map(str, checkpoint))[:8]}"
        )
    named = {_plain_name(key): value for key, value in weights.items()}
    if len(named) < len(weights):
        raise CheckpointError(
            "the checkpoint has weights of a model and of its wrapper under one name: "
            "save one of them, {'state_dict': model.state_dict()}"
        )
    return with_metadata(named, weights)


def without_wrappers(name: str) -> str:
    """The name of a parameter without what wrappers of modules add."""
    return _WRAPPERS.sub("", name)


def _plain_name(name: str) -> str:
    return without_wrappers(name).removeprefix("module.")


def with_metadata(
    weights: dict[str, torch.Tensor], source: dict[str, Any], prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Weights with the metadata of the state dict that they are of, if it has any.

    There torch keeps versions of modules, and a castling attention the state of its
    mask. Its names lose what wrappers added, and then ``prefix``, as the weights' have.
    """
    metadata = getattr(source, "_metadata", None)
    if metadata is None:
        return weights
    weights = OrderedDict(weights)
    weights._metadata = OrderedDict(
        (_plain_name(f"{name}.").removeprefix(prefix).removesuffix("."), value)
        for name, value in metadata.items()
    )
    return weights


def load_weights(model: nn.Module, checkpoint: dict[str, Any], source: str) -> None:
    """Load all of a checkpoint's weights, or none: see :func:`check_weights_fit`."""
    check_weights_fit(model, checkpoint, source)
    model.load_state_dict(weights_of(checkpoint))


def check_weights_fit(
    model: nn.Module, checkpoint: dict[str, Any], source: str
) -> None:
    """Raise CheckpointError unless a checkpoint's names and shapes are a model's.

    The model is not wrapped; ``source`` is the checkpoint's path, for the message.
    """
    own = model.state_dict()
    weights = with_current_names(weights_of(checkpoint), own)
    problems = [f"missing {key}" for key in own if key not in weights]
    problems += [f"unexpected {key}" for key in weights if key not in own]
    problems += [
        f"{key} is {tuple(value.shape)}, the model has {tuple(own[key].shape)}"
        for key, value in weights.items()
        if key in own and own[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint {source} is of another architecture than the model: {shown}"
            f"{more}. Build what it was trained with, by the same config or options"
        )


def save_atomically(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Save a checkpoint as :func:`write_atomically` writes bytes."""
    remove_leftovers(Path(path).parent, Path(path).name)
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write text as :func:`write_atomically` writes bytes."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json_atomically(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON, indented, as :func:`write_atomically` writes bytes.

    Numbers of NumPy and torch are written as plain ones.
    """
    text = json.dumps(value, indent=2, default=_plain_number)
    write_text_atomically(path, text + "\n")


def _plain_number(value: Any) -> Any:
    if isinstance(value, (np.generic, torch.Tensor)) and getattr(value, "ndim", 0) == 0:
        return value.item()
    raise TypeError(
        f"{value!r} of type {type(value).__name__} cannot be written as JSON"
    )
