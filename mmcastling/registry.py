"""Child registries of MMEngine's root registries, scope ``mmcastling``.

A config of any OpenMMLab toolbox reaches what is registered here by scope, for
example ``type='mmcastling.CastlingViT'``. MMEngine looks for them in this module.
"""

from __future__ import annotations

import copy
from typing import Any

from mmengine import registry as root
from mmengine.config import Config

from mmcastling.compat.scoped_registry import ScopedRegistry

SCOPE = "mmcastling"


def type_name(kind: str | type) -> str:
    """The bare name of a config's ``type``: without its scope, of a class its own."""
    name = kind if isinstance(kind, str) else kind.__name__
    return name.rpartition(".")[2]


def model_spec(cfg: Config) -> dict[str, Any]:
    """A copy of what a config says of its model, as MMEngine's Runner would build it.

    A ``data_preprocessor`` beside the model is put into it, where it has none.
    """
    spec = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor") is not None:
        spec.setdefault("data_preprocessor", copy.deepcopy(cfg.data_preprocessor))
    return spec


def _child(name: str, location: str = "mmcastling.version") -> ScopedRegistry:
    parent = getattr(root, name)
    return ScopedRegistry(parent.name, parent=parent, scope=SCOPE, locations=[location])


MODELS = _child("MODELS", "mmcastling.models")
HOOKS = _child("HOOKS", "mmcastling.train")
OPTIM_WRAPPERS = _child("OPTIM_WRAPPERS", "mmcastling.train")
OPTIM_WRAPPER_CONSTRUCTORS = _child("OPTIM_WRAPPER_CONSTRUCTORS", "mmcastling.train")
STRATEGIES = _child("STRATEGIES", "mmcastling.train")

# Nothing of ours is in these: they are there for what a toolbox knows.
_OTHERS = [
    *map(_child, ("DATASETS", "DATA_SAMPLERS", "EVALUATOR", "LOG_PROCESSORS", "LOOPS")),
    *map(_child, ("METRICS", "OPTIMIZERS", "PARAM_SCHEDULERS", "TASK_UTILS")),
    *map(_child, ("TRANSFORMS", "VISBACKENDS", "VISUALIZERS")),
]
