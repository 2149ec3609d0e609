"""Process groups over gloo by MMEngine's launchers, which choose a GPU for each."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from mmengine.dist import init_dist


def start_group_on_cpu(launcher: str, **options: Any) -> None:
    """MMEngine's ``init_dist`` where there is no accelerator: gloo replaces NCCL."""
    if options.get("backend", "nccl") == "nccl":
        options["backend"] = "gloo"
    with mock.patch.object(torch.cuda, "set_device"):
        init_dist(launcher, **options)
