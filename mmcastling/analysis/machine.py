"""Where a figure was measured, and the most memory that a piece of work held."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mmcastling.errors import UnavailableError
from mmcastling.version import __version__

_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures the peak of memory inside a ``with`` block.

    On CUDA from torch's allocator. On a CPU from the resident memory of the whole
    process, which Linux alone reports; what the allocator had kept free before counts
    as unused only where it can be given back, so measure in a fresh process.

    Args:
        device: Where the work runs. Defaults to ``'cpu'``.

    Attributes:
        bytes: The peak beyond what was in use at the start, once the block has ended.

    Raises:
        RuntimeError: If the device or system does not tell.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        if self.device.type not in ("cpu", "cuda"):
            raise UnavailableError(
                f"peak memory on {device!r} is not known: measure on 'cpu' or 'cuda'"
            )
        if self.device.type == "cpu" and not _CLEAR_REFS.exists():
            raise UnavailableError(
                f"peak resident memory can be reset on Linux only, not on "
                f"{sys.platform}: measure there, or on 'cuda'"
            )

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR_REFS.write_text("5")  # reset the peak, proc(5)
            self._before = _status("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM")
        self.bytes = max(0, peak - self._before)


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


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
