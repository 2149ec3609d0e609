"""Which adapter castles which attention class.

Classes of libraries are named by path and looked up only once their module has been
imported (a model cannot hold a class of a module that nobody imported), so that no
library needs to be installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from mmcastling.errors import UserError

Adapt = TypeVar("Adapt", bound=Callable[..., nn.Module])
ModuleType = type[nn.Module] | str
Rule = Callable[[type[nn.Module]], bool]


class CannotCastle(UserError):
    """Raised by an adapter for an attention that it must leave alone, with the reason.

    The attention keeps its softmax and the reason goes into the report.
    """


# What was registered: the attention, what it must be inside of, and its adapter.
_ADAPTERS: list[
    tuple[ModuleType | Rule, ModuleType | None, Callable[..., nn.Module]]
] = []


def register_adapter(
    attention: ModuleType | Rule, *, inside: ModuleType | None = None
) -> Callable[[Adapt], Adapt]:
    """Register the decorated function as the adapter of an attention class.

    The function is called as ``adapt(attention, build)`` with a module of that class
    and a :class:`~mmcastling.castle.MixerBuilder`, and returns the module that takes
    its place: most simply a :class:`~mmcastling.castle.CastledAttention` that holds the
    old one's projections. It changes nothing in the module it is given, since an error
    elsewhere must leave the model as it was. What it keeps, it keeps as the same
    parameters; the report follows from that.

    Subclasses are castled too unless they override ``forward``, of which the adapter
    knows nothing. Among adapters of one class the last registered wins.

    Args:
        attention: The class, or the path under which it can be imported, such as
            ``'timm.models.vision_transformer.Attention'``, or a function that says of a
            class whether it is one.
        inside: Class, or path, of the module that must hold the attention; for general
            classes such as ``nn.MultiheadAttention``, which may be called with other
            keys than queries. Defaults to None (any).
    """

    def register(adapt: Adapt) -> Adapt:
        _ADAPTERS.append((attention, inside, adapt))
        return adapt

    return register


def leave_alone(attention: ModuleType, reason: str) -> None:
    """Say why attentions of a class, or of a path, are not castled.

    It goes into the report. An adapter that is registered later takes precedence.
    """

    def decline(old: nn.Module, build: object) -> nn.Module:
        raise CannotCastle(reason)

    decline.reason = reason
    register_adapter(attention)(decline)


def find_adapter(
    module: nn.Module, parent: nn.Module | None
) -> Callable[..., nn.Module] | None:
    """The adapter of a module that ``parent`` holds, or None.

    Raises:
        CannotCastle: If the module is of a subclass that overrides ``forward``.
    """
    for cls in type(module).__mro__:
        for attention, inside, adapt in reversed(_ADAPTERS):
            if not _names(attention, cls):
                continue
            if inside and not isinstance(parent, _resolve(inside) or ()):
                continue
            if reason := getattr(adapt, "reason", None):
                raise CannotCastle(reason)
            if type(module).forward is not cls.forward:
                raise CannotCastle(
                    f"{type(module).__name__} overrides the forward of {cls.__name__}: "
                    "register an adapter for it"
                )
            return adapt
    return None


def _names(attention: ModuleType | Rule, cls: type) -> bool:
    if isinstance(attention, (str, type)):
        return _resolve(attention) is cls
    return issubclass(cls, nn.Module) and attention(cls)


def _resolve(target: ModuleType) -> type[nn.Module] | None:
    if not isinstance(target, str):
        return target
    module, _, name = target.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
