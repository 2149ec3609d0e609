"""Checkpoints: read without running their code, written whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, get_torch_safe_globals
from torch import nn

from mmcastling.attention.old_names import with_current_names

_TEMPORARY = ".mmcastling-tmp"
"""How the name of a file ends while it is written."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A file that is truncated or no checkpoint at all."""


def _history_statistic(owner: type, name: str) -> Any:
    # HistoryBuffer pickles its statistics as getattr(HistoryBuffer, name). The general
    # getattr would let a file reach any attribute of anything it may name.
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"getattr of {name!r} is not allowed")
    return getattr(HistoryBuffer, name)


@functools.cache
def _safe_globals() -> list[Any]:
    allowed = [item for item in get_torch_safe_globals() if item is not getattr]
    return [*allowed, (_history_statistic, "builtins.getattr")]


def load_checkpoint(
    path: str | os.PathLike[str], map_location: Any = "cpu"
) -> dict[str, Any]:
    """Load a checkpoint from disk without unpickling code.

    Reads tensors, plain Python values, numpy arrays and MMEngine's training history,
    nothing else.

    Args:
        path: A local file.
        map_location: As in :func:`torch.load`. Defaults to ``'cpu'``.

    Raises:
        DamagedCheckpointError: If the file is truncated or is not a checkpoint.
        CheckpointError: If the file is missing or holds code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: check the path")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"checkpoint {path} may not be read: check its mode")
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_broken_archive(path):
            raise DamagedCheckpointError(_damaged(path)) from error
        reason = str(error).partition("GLOBAL ")[2].split(" was not")[0]
        what = f"the object {reason}" if reason else "something other than tensors"
        raise CheckpointError(
            f"checkpoint {path} is refused: it asks to run code or holds {what}, which "
            "a file of weights does not need. If you trust its origin, load it with "
            "its own library and save {'state_dict': model.state_dict()}"
        ) from error
    except Exception as error:  # whatever the parsers say of damaged bytes
        raise DamagedCheckpointError(_damaged(path)) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(checkpoint).__name__}, expected a dict "
            "with 'state_dict'"
        )
    return checkpoint


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


@contextlib.contextmanager
def safe_mmengine_loading() -> Iterator[None]:
    """Make MMEngine load every checkpoint through :func:`load_checkpoint`.

    MMEngine falls back to unpickling when a file asks for it; inside this context
    ``--resume``, ``load_from`` and ``init_cfg`` do not.
    """
    schemes = CheckpointLoader._schemes.copy()  # registering replaces the attribute
    # torch's own switch covers what is downloaded rather than read from disk. Beside
    # its opposite, which old recipes set, torch refuses to load anything.
    switches = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    forced = {name: os.environ.pop(name, None) for name in switches}

    def local(filename: str, map_location: Any = None) -> dict[str, Any]:
        return load_checkpoint(filename, map_location)

    CheckpointLoader.register_scheme(prefixes="", loader=local, force=True)
    os.environ[switches[0]] = "1"
    try:
        yield
    finally:
        CheckpointLoader._schemes = schemes
        os.environ.pop(switches[0])
        os.environ.update({k: v for k, v in forced.items() if v is not None})


def weights_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, without a wrapper's ``module.`` prefix.

    Raises:
        CheckpointError: If there are no tensors in it.
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
    return {key.removeprefix("module."): value for key, value in weights.items()}


def load_weights(model: nn.Module, checkpoint: dict[str, Any], source: str) -> None:
    """Load all of a checkpoint's weights into a model, or none.

    Args:
        model: The model, not wrapped.
        checkpoint: A loaded checkpoint.
        source: Its path, for the message.

    Raises:
        CheckpointError: If a name or a shape does not fit; the model is unchanged.
    """
    check_weights_fit(model, checkpoint, source)
    model.load_state_dict(weights_of(checkpoint))


def check_weights_fit(
    model: nn.Module, checkpoint: dict[str, Any], source: str
) -> None:
    """Raise unless a checkpoint has exactly the weights that a model expects.

    Args:
        model: The model, not wrapped.
        checkpoint: A loaded checkpoint.
        source: Its path, for the message.

    Raises:
        CheckpointError: If a name is missing or unexpected, or a shape differs.
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
            f"checkpoint {source} is of another architecture than the config: {shown}"
            f"{more}. Use the config that it was trained with"
        )


def save_atomically(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Save a checkpoint under a temporary name beside it, then rename.

    Args:
        checkpoint: What to save.
        path: Destination; its folder must exist.

    Raises:
        CheckpointError: If it cannot be written, for example on a full disk. Nothing is
            left behind, and a previous file stays as it was.
    """
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]
) -> None:
    """Write a file so that at any moment it is the previous one or the new one, whole.

    Args:
        path: Destination; its folder must exist.
        write: Called with the open temporary file, which lies beside the destination
            until it is on the disk.

    Raises:
        CheckpointError: If it cannot be written, for example on a full disk. Nothing is
            left behind, and a previous file stays as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(
            f"cannot write {path}: the folder {path.parent} does not exist, create it "
            "first"
        )
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY, delete=False
        ) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; what was saved before is untouched"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)  # nothing is there once it was renamed


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write text as :func:`write_atomically` writes bytes.

    Raises:
        CheckpointError: If it cannot be written. A previous file stays as it was.
    """
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json_atomically(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON, indented, as :func:`write_atomically` writes bytes.

    Raises:
        CheckpointError: If it cannot be written. A previous file stays as it was.
    """
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what :func:`write_atomically` left in a folder when it was killed.

    Args:
        folder: A folder in which no other process is saving.

    Returns:
        The removed files.
    """
    leftovers = sorted(Path(folder).glob(f".*{_TEMPORARY}"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def _sync_folder(folder: Path) -> None:
    # Without it a renaming may be lost with the power, though the file is on the disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
