"""Castling-ViT for OpenMMLab: castle a vision transformer, train it, deploy it.

Importing this package makes the installed OpenMMLab stack usable, also where mmcv has
no compiled ops, and registers everything that a config can name. Where torch is not
installed, what is left is :mod:`mmcastling.runtime`.
"""

from importlib.util import find_spec

from mmcastling.version import __version__

__all__ = ["__version__"]

if find_spec("torch") is not None:
    from mmcastling.compat import install_mmcv_ops

    install_mmcv_ops()  # before anything below imports mmcv.ops

    from mmcastling import models, train  # noqa: F401
    from mmcastling.castle import castle, register_adapter
    from mmcastling.compat.model_index import find_config, register_names
    from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

    register_names()
    if find_spec("timm") is not None:  # whose create_model then knows our names
        from mmcastling.models import timm_models  # noqa: F401

    __all__ += [
        "castle",
        "castling_modules",
        "find_config",
        "register_adapter",
        "set_mask",
        "switch_to_deploy",
    ]
