"""Files that appear whole or not at all, several together too, and leave nothing."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mmcastling.errors import CheckpointError, ConfigError

_TEMPORARY = ".mmcastling-tmp"  # ends the name of what is being written


def check_writable(
    path: str | os.PathLike[str], *suffixes: str, option: str = "--out"
) -> Path:
    """The path of a file that may be written, or an error before any work is done.

    Suffixes are those that it may have, any where none is given; messages name it by
    the option.
    """
    path = Path(path)
    if suffixes and path.suffix not in suffixes:
        problem = f"end the name in {' or '.join(suffixes)}"
    elif path.is_dir():
        problem = "it is a folder, name a file"
    elif not path.absolute().parent.is_dir():
        problem = f"the folder {path.parent} does not exist, create it first"
    elif not os.access(path.absolute().parent, os.W_OK):
        problem = f"the folder {path.parent} is read-only, choose another"
    else:
        return path
    raise ConfigError(f"cannot write {option} {path}: {problem}")


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]
) -> None:
    """Write a file so that at any moment it is the previous one or the new one, whole.

    ``write`` is called with an open temporary file beside it. Raises CheckpointError if
    that fails, for example on a full disk: nothing is left behind then, and a previous
    file stays as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise CheckpointError(
            f"cannot write {path}: the folder {path.parent} does not exist, create it "
            "first"
        )
    try:
        with _temporary(path, Path.touch) as temporary:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot write {path}: {error}; what was saved before is untouched"
        ) from error


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/mmcastling``, or ``~/.cache/mmcastling`` without it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells programs to ignore a relative path here.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "mmcastling"


@contextlib.contextmanager
def temporary_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside a file that is to be written, removed in the end.

    What a kill left of an earlier one for the same file is removed first.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    with _temporary(path, Path.mkdir) as folder:
        yield folder


def replace_together(folder: Path, targets: list[Path]) -> None:
    """Move files out of a temporary folder into the places of others of their names.

    All of them, or none where that fails or is interrupted. A kill in between leaves
    none of those places taken, so that new and old are never mixed.
    """
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        moved.append((source, target))
        source.replace(target)

    try:
        for target in filter(Path.exists, targets):
            move(target, folder / f"former-{target.name}")
        for target in targets:
            move(folder / target.name, target)
    except BaseException:
        for source, target in reversed(moved):
            if target.exists() and not source.exists():
                target.replace(source)
        raise
    _sync_folder(targets[0].parent)


def remove_leftovers(folder: str | os.PathLike[str], name: str = "") -> list[Path]:
    """Remove what was left in a folder when those who were writing were killed.

    What another process is writing stays. With a name only what was to become that
    file. Returns what was removed.
    """
    pattern = f".{glob.escape(name)}{'.' if name else ''}*{_TEMPORARY}"
    removed = []
    for path in sorted(Path(folder).glob(pattern)):
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
            removed.append(path)
    return removed


@contextlib.contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make something beside a path, locked while it is in use; removed in the end."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    with contextlib.ExitStack() as stack:
        is_locked = False
        while not is_locked:
            make(temporary)
            stack.callback(_remove, temporary)
            # Between the two lines it may be taken for a leftover.
            with contextlib.suppress(FileNotFoundError):
                descriptor = stack.enter_context(_opened(temporary))
                with contextlib.suppress(OSError):  # not every file system can
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                is_locked = os.fstat(descriptor).st_nlink > 0
        yield temporary


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)  # nothing is there once it was renamed


def _sync_folder(folder: Path) -> None:
    # Without it a renaming may be lost with the power, though the file is on the disk.
    with _opened(folder) as descriptor, contextlib.suppress(OSError):
        os.fsync(descriptor)  # not every file system can
