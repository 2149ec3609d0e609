"""Environment variables that training on a CPU profits from."""

from __future__ import annotations

import os

CPU_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""glibc returns large buffers to the system after every step and faults them in anew at
the next, so they are kept; and threads that spin while they wait stall each other where
something else runs. ``tools/cpu_environment.sh`` sets the same for launch scripts."""


def cpu_environment() -> dict[str, str]:
    """The environment of a process that will run on a CPU; a user's settings win."""
    return {**CPU_ENVIRONMENT, **os.environ}
