"""What the commands in ``tools/`` do, as functions: train, test, convert.

Each is imported when it is asked for, as most need OpenMMLab and some do not.
"""

import importlib
from typing import Any

from mmcastling.errors import ConfigError  # noqa: F401, which all of them raise

_MODULES = {
    "arguments": ("DATA_VARIABLE",),
    "config": ("check_data", "load_config"),
    "conversion": ("convert",),
    "failures": ("run_cli",),
    "load": ("PruningReport", "load_pruned_model"),
    "testing": ("Evaluation", "ExportedEvaluation", "evaluate", "evaluate_exported"),
    "training": ("train",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
