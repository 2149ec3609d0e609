"""A stand-in for ``mmcv._ext``, the compiled half of mmcv.

``mmcv.ops`` loads ``mmcv._ext`` while it is imported and asserts that every op it
knows is there, so an mmcv built without its C++ ops cannot even be imported in full.
The stand-in holds the ops of :mod:`mmcastling.compat.mmcv_ops`; any other op name
imports and raises :class:`MissingOpError` when called.

:mod:`mmcastling.compat.on_import` offers it after all others, so that an ``mmcv._ext``
that exists, compiled or put there by somebody else, is never touched.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NoReturn

import torch

from mmcastling.compat.mmcv_ops import KERNELS
from mmcastling.errors import UserError

EXT_NAME = "mmcv._ext"

# Once imported without ops, these hold functions that only raise, for as long as the
# process lives: mmdet and mmseg put such placeholders where `import mmcv.ops` fails.
_KEEPS_PLACEHOLDERS = ("mmdet.structures.mask", "mmseg.models")


class MissingOpError(UserError, RuntimeError):
    """An mmcv op, by its name in ``mmcv._ext``, was called that is not there."""

    def __init__(self, op: str) -> None:
        self.op = op
        super().__init__(op)

    def __str__(self) -> str:
        return (
            f"mmcv op '{self.op}' was called, but this mmcv was built without its "
            f"compiled ops and mmcastling has no replacement for '{self.op}'. Either "
            f"install an mmcv with ops compiled for torch {torch.__version__}, for "
            "example from source with `MMCV_WITH_OPS=1 pip install "
            "--no-build-isolation --no-binary onedl-mmcv --force-reinstall --no-deps "
            "onedl-mmcv`, or choose a config that does not use this op."
        )


class _StandInLoader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        _require_torchvision_kernels()
        module.__doc__ = "mmcastling's stand-in for mmcv's compiled ops."
        vars(module).update(KERNELS)
        vars(module)["__getattr__"] = _missing_op


def stand_in_spec() -> importlib.machinery.ModuleSpec:
    """What the import system needs to make the stand-in."""
    return importlib.machinery.ModuleSpec(EXT_NAME, _StandInLoader(), origin=__name__)


def _missing_op(name: str) -> Callable[..., NoReturn]:
    # No op starts with an underscore, while Python, pickle and test tools probe modules
    # for such names and take an answer for a yes.
    if name.startswith("_"):
        raise AttributeError(f"module '{EXT_NAME}' has no attribute '{name}'")

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise MissingOpError(name)

    missing.__name__ = missing.__qualname__ = name
    return missing


def require_ops() -> None:
    """Make sure that ``mmcv.ops`` can be imported, by the stand-in if need be.

    Raises ImportError if mmcv, or what the stand-in needs of torchvision, is not there;
    warns where it comes too late for parts of mmdet or mmseg.
    """
    if importlib.util.find_spec("mmcv") is None:
        raise ImportError(
            "mmcastling's models need mmcv, which is not installed here. Install it "
            "with `pip install onedl-mmcv` (compiled ops are optional).",
            name="mmcv",
        )
    importlib.import_module(EXT_NAME)
    late = [name for name in _KEEPS_PLACEHOLDERS if name in sys.modules]
    if late and "mmcv.ops" not in sys.modules:
        warnings.warn(
            f"{', '.join(late)} was imported before mmcastling, while mmcv had no ops, "
            "and will fail where it uses them. Import mmcastling first.",
            stacklevel=2,
        )


def _require_torchvision_kernels() -> None:
    try:
        importlib.import_module("torchvision")
        # Attribute access on torch.ops is what looks the kernel up.
        _ = torch.ops.torchvision.roi_align, torch.ops.torchvision.nms
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # A torchvision built for another torch fails with any of these four.
        raise ImportError(
            "mmcv has no compiled ops here, so mmcastling runs them on torchvision's "
            f"kernels, but these cannot be used: {type(error).__name__}: {error}. "
            "Install the torchvision release that belongs to torch "
            f"{torch.__version__}.",
            name="torchvision",
        ) from error
