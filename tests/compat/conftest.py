"""mmcv's Python ops, bound to the kernels under test whatever mmcv is installed."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torchvision  # noqa: F401  (registers the kernels that ours call)

from mmcastling.compat.mmcv_ops import KERNELS


@pytest.fixture
def mmcv_ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``mmcv.ops`` whose wrappers call mmcastling's kernels, not compiled ones."""
    ops = importlib.import_module("mmcv.ops")
    kernels = SimpleNamespace(**KERNELS)
    for name, module in list(sys.modules.items()):
        if name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
            monkeypatch.setattr(module, "ext_module", kernels)
    return ops
