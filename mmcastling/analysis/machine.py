"""Where a figure was measured, and the most memory that a piece of work held."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmcastling.errors import UnavailableError
from mmcastling.version import __version__

_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")


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


def instruction_set(device: str | torch.device = "cpu") -> str:
    """What a device multiplies with, as the name of a file: ``'avx2'``, ``'avx512'``,
    ``'amx'``, or the name of a GPU.

    Figures are compared only within one of them.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif torch.cpu.get_capabilities().get("amx_tile"):  # which torch's own kernels lack
        name = "AMX"
    else:
        name = torch.backends.cpu.get_cpu_capability()
    return re.sub(r"\W+", "_", name).lower()


def available_bytes(device: str | torch.device = "cpu") -> int | None:
    """Memory that a device has left, None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        found.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # of a container
        limit, used = (_CGROUP / f"memory.{name}" for name in ("max", "current"))
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)


def estimated_peak(run: Callable[[Tensor], Any], image: Tensor) -> int:
    """The most bytes that the results of a pass hold at once, which is not computed.

    What is fused, or computed a few tokens at a time, takes less.

    Args:
        run: The pass.
        image: A fake tensor or one on the meta device, or whatever else tells ``run``
            sizes alone.
    """
    held = most = 0

    class Live(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal held, most
            found = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(found):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in known:
                        known.add(storage._cdata)
                        size = storage.nbytes()
                        weakref.finalize(storage, free, storage._cdata, size)
                        held += size
                        most = max(most, held)
            return found

    def free(key: int, size: int) -> None:
        nonlocal held
        known.discard(key)
        held -= size

    known: set[int] = set()
    with Live(), torch.no_grad():
        run(image)
    return most


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, processor and threads of this process, as plain values for JSON.

    Args:
        device: Where the figures are measured. Defaults to ``'cpu'``.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        # Machines of one name differ in what their cores compute with.
        name = f"{_cpu_name()} with {instruction_set(device).upper()}"
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
