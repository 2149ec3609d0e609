"""Where a figure was measured."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from mmcastling.version import __version__


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, processor and threads of this process, as plain values for JSON.

    Args:
        device: Where the figures are measured. Defaults to ``'cpu'``.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        # Machines of one name differ in what their cores compute with.
        name = f"{_cpu_name()} with {torch.backends.cpu.get_cpu_capability()}"
    return dict(
        device=name,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        mmcastling=__version__,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
