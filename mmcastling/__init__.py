"""Castling-ViT for OpenMMLab: castle a vision transformer, train it, deploy it.

Importing this package makes the installed OpenMMLab stack usable, also where mmcv has
no compiled ops, and registers everything that a config can name.
"""

from mmcastling.compat import install_mmcv_ops

install_mmcv_ops()  # before anything below imports mmcv.ops

from mmcastling import backbones, classifiers, hooks, necks, optim  # noqa: E402, F401
from mmcastling.castle import castle, register_adapter  # noqa: E402
from mmcastling.model_index import find_config, register_names  # noqa: E402
from mmcastling.protocol import (  # noqa: E402
    castling_modules,
    set_mask,
    switch_to_deploy,
)
from mmcastling.version import __version__  # noqa: E402

register_names()
try:
    import timm as _timm  # noqa: F401
except ImportError:
    pass  # optional: timm.create_model then has no names to know
else:
    from mmcastling import timm_models  # noqa: F401

__all__ = [
    "__version__",
    "castle",
    "castling_modules",
    "find_config",
    "register_adapter",
    "set_mask",
    "switch_to_deploy",
]
