"""Process groups over gloo by MMEngine's launchers, which choose a GPU for each."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from mmengine.dist import init_dist


def start_group_on_cpu(launcher: str, **options: Any) -> None:
    """Start the process group of a launcher where there is no accelerator.

    Args:
        launcher: As MMEngine's ``init_dist`` takes it.
        **options: Arguments of ``init_process_group``; NCCL is replaced by gloo.
    """
    if options.get("backend", "nccl") == "nccl":
        options["backend"] = "gloo"
    with mock.patch.object(torch.cuda, "set_device"):
        init_dist(launcher, **options)
