"""Child registries of MMEngine's root registries, scope ``mmcastling``.

A config of any OpenMMLab toolbox reaches what is registered here by scope, for
example ``type='mmcastling.CastlingViT'``.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
)
from mmengine.registry import Registry

MODELS = Registry(
    "model",
    parent=MMENGINE_MODELS,
    scope="mmcastling",
    locations=["mmcastling.backbones", "mmcastling.necks"],
)
HOOKS = Registry(
    "hook", parent=MMENGINE_HOOKS, scope="mmcastling", locations=["mmcastling.hooks"]
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="mmcastling",
    locations=["mmcastling.optim"],
)
