"""The folder of a run: it can be written, and one training has it for itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mmcastling.errors import CheckpointError, ConfigError

LOCK = ".mmcastling-lock"
"""The file in a work directory that a training holds, and names its process in."""


def check_work_dir(work_dir: str | os.PathLike[str]) -> None:
    """Create the work directory, and raise unless files can be written in it."""
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir) as file:
            file.write(b"1")
    except OSError as error:
        raise ConfigError(
            f"the work directory {work_dir} cannot be written: {error}; choose another "
            "with --work-dir"
        ) from error


@contextlib.contextmanager
def claimed_work_dir(work_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the work directory for one training, which says so if the folder vanishes.

    Raises:
        ConfigError: If another training has it, or it was removed in the meantime.
    """
    lock = Path(work_dir) / LOCK
    with _locked(lock):
        try:
            yield
        except (OSError, CheckpointError) as error:
            if lock.exists():
                raise
            raise ConfigError(
                f"the work directory {work_dir} has vanished while training wrote to "
                f"it ({error}): it was removed, moved, or its disk is gone. Train with "
                "--resume once it is there again, or anew with another --work-dir"
            ) from error
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    while True:
        with path.open("a+") as file:
            _lock(file, path)
            # Who had it before may have removed the file that is open here.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"process {os.getpid()} on {socket.gethostname()}, {since}")
                file.flush()
                yield
                return


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "a process that cannot be named"
        raise ConfigError(
            f"the work directory {path.parent} is in use by another training: {owner}. "
            "Wait for its end, end it, or choose another folder with --work-dir"
        ) from None
    except OSError:
        pass  # not every file system has locks
