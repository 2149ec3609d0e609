"""MMEngine reads checkpoints without running their code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from mmengine.runner.checkpoint import CheckpointLoader

from mmcastling.checkpoint import load_checkpoint

# torch's own switch covers what is downloaded rather than read from disk. Beside its
# opposite, which old recipes set, torch refuses to load anything.
_ON, _OFF = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def safe_mmengine_loading() -> Iterator[None]:
    """Make MMEngine load every checkpoint through :func:`load_checkpoint`.

    MMEngine falls back to unpickling when a file asks for it; inside this context
    ``--resume``, ``load_from`` and ``init_cfg`` do not.
    """

    def local(filename: str, map_location: Any = None) -> dict[str, Any]:
        return load_checkpoint(filename, map_location)

    schemes = dict(CheckpointLoader._schemes)
    with (
        mock.patch.object(CheckpointLoader, "_schemes", schemes),
        mock.patch.dict(os.environ, {_ON: "1"}),
    ):
        os.environ.pop(_OFF, None)
        CheckpointLoader.register_scheme(prefixes="", loader=local, force=True)
        yield
