"""Child registries of MMEngine's root registries, scope ``mmcastling``.

A config of any OpenMMLab toolbox reaches what is registered here by scope, for
example ``type='mmcastling.CastlingViT'``. MMEngine looks for them in this module.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from mmengine import registry as root
from mmengine.config import Config
from mmengine.registry import DefaultScope, Registry

from mmcastling.errors import ConfigError

SCOPE = "mmcastling"
TOOLBOXES = ("mmpretrain", "mmdet", "mmseg")


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


class ScopedRegistry(Registry):
    """A registry in whose scope the names of the toolbox in use are known too.

    A config that inherits one of ours as ``mmcastling::castling/NAME.py`` has its parts
    built in our scope by MMEngine, and most of them are the toolbox's.
    """

    def get(self, key: str) -> Any:
        """What is registered under a name: here, in the toolbox, or in MMEngine."""
        self.import_from_location()
        if "." not in key and key not in self._module_dict:
            found = {}
            for scope in _scopes_in_use():
                registry = self._get_root_registry()._search_child(scope)
                if registry is not None:
                    registry.import_from_location()
                    if key in registry._module_dict:
                        found[scope] = registry._module_dict[key]
            if len(found) > 1:
                raise ConfigError(
                    f"{key} is known to {' and to '.join(found)}: say which is meant "
                    "with mmengine.registry.init_default_scope"
                )
            if found:
                return found.popitem()[1]
        return super().get(key)


def _scopes_in_use() -> list[str]:
    """The default scope outside ours; without one, every toolbox that is imported."""
    scopes = [scope.scope_name for scope in DefaultScope._instance_dict.values()]
    outer = [scope for scope in scopes if scope in TOOLBOXES]
    return outer[-1:] or [name for name in TOOLBOXES if name in sys.modules]


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
