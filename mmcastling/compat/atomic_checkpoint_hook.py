"""AtomicCheckpointHook: at any moment of saving a whole checkpoint is on the disk."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.fileio.backends import prefix_to_backends
from mmengine.hooks import CheckpointHook, checkpoint_hook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import Runner

from mmcastling.checkpoint import (
    remove_leftovers,
    write_atomically,
    write_text_atomically,
)
from mmcastling.registry import HOOKS


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local files, each of which appears whole or not at all.

    Raises:
        CheckpointError: Where a file cannot be written, for example on a full disk.
    """

    def put(self, obj: bytes, filepath: str | os.PathLike[str]) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(filepath, lambda file: file.write(obj))

    def put_text(
        self, obj: str, filepath: str | os.PathLike[str], encoding: str = "utf-8"
    ) -> None:
        self.put(obj.encode(encoding), filepath)


@MMENGINE_HOOKS.register_module()
@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, of which a kill leaves a usable checkpoint.

    Checkpoints, and ``last_checkpoint`` which names the newest, are written under
    temporary names and renamed when they are on the disk. Outdated ones
    (``max_keep_ckpts``, the former best) are removed after that, so for the time of
    saving there is one more. A full disk ends training with the checkpoint's name.
    What a killed run left half-written is removed when the next one starts. What
    another run keeps, of which this one is a copy or a continuation, is left alone.

    It takes the arguments of ``CheckpointHook`` and its place in a config of any
    toolbox. Storage that is not local (``backend_args``) keeps its own way of writing::

        default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1))

    Raises:
        CheckpointError: While training, if a checkpoint cannot be written.
    """

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        # A run that was resumed from elsewhere would remove the best one there.
        if getattr(self, "best_ckpt_path", None):
            self.best_ckpt_path = self._in_own_folder(self.best_ckpt_path)
        for key, path in getattr(self, "best_ckpt_path_dict", {}).items():
            if path:
                self.best_ckpt_path_dict[key] = self._in_own_folder(path)
        if is_main_process():
            for folder in {str(self.out_dir), str(runner.work_dir)}:
                for path in remove_leftovers(folder):  # nothing, if it is not local
                    runner.logger.info(f"removed {path}, which a kill left unfinished")

    def _in_own_folder(self, path: str) -> str:
        return self.file_backend.join_path(self.out_dir, os.path.basename(path))

    def after_train(self, runner: Runner) -> None:
        with whole_local_files():
            super().after_train(runner)

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict[str, Any]
    ) -> None:
        # The name of the newest checkpoint is the one file that MMEngine opens itself.
        opened = mock.patch.object(
            checkpoint_hook, "open", _open_atomically, create=True
        )
        with whole_local_files(), self._removals_last(), opened:
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        with whole_local_files(), self._removals_last():
            super()._save_best_checkpoint(runner, metrics)

    @contextlib.contextmanager
    def _removals_last(self) -> Iterator[None]:
        """Put off what is removed until all is saved."""
        backend = self.file_backend
        files: list[str] = []
        folders: list[str] = []  # of FSDP or DeepSpeed
        self.file_backend = copy.copy(backend)
        self.file_backend.remove = files.append
        self.file_backend.rmtree = folders.append
        try:
            yield
        finally:
            self.file_backend = backend
        for path in files:
            backend.remove(path)
        for path in folders:
            backend.rmtree(path)


@contextlib.contextmanager
def _open_atomically(path: str, mode: str) -> Iterator[io.StringIO]:
    text = io.StringIO()
    yield text
    write_text_atomically(path, text.getvalue())


@contextlib.contextmanager
def whole_local_files() -> Iterator[None]:
    """Let all that MMEngine writes to local files appear whole or not at all."""
    # Of the ways to save only Runner's takes backend_args; FlexibleRunner's strategies
    # ask the registry for the backend of local paths, as every other does.
    usual = prefix_to_backends[""]
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")
    try:
        yield
    finally:
        register_backend("local", usual, force=True, prefixes="")
