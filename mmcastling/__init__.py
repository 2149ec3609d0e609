"""Castling-ViT: castle a vision transformer, train it, deploy it.

What is imported here needs torch alone. Where OpenMMLab is installed, its registries,
configs and inferencers know all that this package adds to them, and so does timm's
``create_model``, whichever is imported first; it is loaded when they first ask for it.
Where torch is not installed, what is left is :mod:`mmcastling.runtime`.
"""

import importlib
from importlib.util import find_spec
from typing import Any

from mmcastling.compat import on_import
from mmcastling.version import __version__

__all__ = ["__version__"]

if find_spec("torch") is not None:
    from mmcastling.alignment import align, scan
    from mmcastling.castle import castle, register_adapter
    from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

    __all__ += [
        "align",
        "castle",
        "castling_modules",
        "doctor",
        "export",
        "find_config",
        "register_adapter",
        "scan",
        "set_mask",
        "switch_to_deploy",
    ]

on_import.install()

_LATER = {
    "doctor": "mmcastling.analysis",
    "find_config": "mmcastling.compat.model_index",
}


def __getattr__(name: str) -> Any:
    """Some functions, and the package's folders, imported when they are asked for.

    The folder ``export`` is the function of that name, too.
    """
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    try:
        return importlib.import_module(f"mmcastling.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"mmcastling.{name}":
            raise
        raise AttributeError(
            f"module 'mmcastling' has no attribute {name!r}: {error}"
        ) from None
