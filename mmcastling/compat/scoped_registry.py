"""Registries of a scope in which the names of the toolbox in use are known too."""

from __future__ import annotations

import sys
from typing import Any

from mmengine.registry import DefaultScope, Registry

from mmcastling.errors import ConfigError

TOOLBOXES = ("mmpretrain", "mmdet", "mmseg")


class ScopedRegistry(Registry):
    """A registry in whose scope the names of the toolbox in use are known too.

    A config that inherits one of ours as ``mmcastling::castling/NAME.py`` has its parts
    built in our scope by MMEngine, and most of them are the toolbox's.
    """

    def get(self, key: str) -> Any:
        """What is registered under a name: here, in the toolbox, or in MMEngine.

        Raises:
            ConfigError: If two toolboxes know it and no default scope says which is in
                use.
        """
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
