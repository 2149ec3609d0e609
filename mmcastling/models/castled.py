"""``type='mmcastling.Castled'``: a backbone of any toolbox, castled by a config."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mmcastling.castle import CastleReport, castle
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.registry import MODELS
from mmcastling.verbs import switch_to_deploy

# What the toolboxes are called where pip finds them.
_PACKAGES = {"mmdet": "onedl-mmdetection", "mmpretrain": "onedl-mmpretrain"}
_PACKAGES["mmseg"] = "onedl-mmsegmentation"
# What makes a backbone load weights, by settings of mmpretrain, mmseg and timm.
_STARTS = ("init_cfg", "pretrained", "checkpoint_path")
# Arguments of castle() that stand beside the attention in a config.
_BESIDE = ("stages", "keep", "budget", "images", "grid", "deploy", "predicate")
_BESIDE += ("return_report",)


@MODELS.register_module()
class Castled:
    """Builds the backbone of a config, castles it in place and gives it back.

    What a detector, segmentor or classifier holds is the backbone itself, of its own
    class and with its own names of parameters: its checkpoints, ``init_cfg``,
    ``frozen_stages`` and the like are what they were. What castling adds to an
    attention that is frozen is frozen too.

    Example:
        >>> backbone = dict(
        ...     type='mmcastling.Castled',
        ...     backbone=dict(type='mmdet.SwinTransformer'),
        ...     attention=dict(type='castling', mask_threshold='4/N'),
        ...     keep=[-1])
    """

    def __new__(
        cls,
        backbone: dict[str, Any],
        attention: dict[str, Any] | None = None,
        stages: Iterable[int] | None = None,
        keep: Iterable[int | str] = (),
        grid: tuple[int, int] | None = None,
        deploy: bool = False,
    ) -> nn.Module:
        """Build, castle, and deploy if asked.

        Args:
            backbone: Config of a backbone that any registry knows, such as
                ``dict(type='mmdet.SwinTransformer')``.
            attention: Options of the attention, with ``type``, as of
                :func:`mmcastling.castle.castle`. Defaults to None (``'castling'``).
            stages: Which stages to castle, see there. Defaults to None (all).
            keep: Attentions that stay softmax, by index or name, see there. Defaults to
                none.
            grid: ``(H, W)`` of the tokens, see there. Defaults to None.
            deploy: Whether to build the deployed form. Defaults to False.

        Raises:
            ValueError: If the backbone is not known, is castled already or holds
                nothing that can be, or an option has a bad value.
            UnavailableError: If it needs a package that is not installed.
        """
        attention = {} if attention is None else attention
        if not isinstance(attention, Mapping) or set(attention) & set(_BESIDE):
            raise OptionError(
                f"Castled(attention={attention!r}): expected options of the attention, "
                "such as dict(type='castling'); stages, keep, grid and deploy stand "
                "beside it"
            )
        if deploy and isinstance(backbone, Mapping):
            # It is castled first, and deployed with what was castled.
            backbone = {k: v for k, v in backbone.items() if k != "deploy"}
        network = _build(backbone)
        shapes = {
            name: torch.empty_like(value, device="meta")
            for name, value in network.state_dict().items()
        }
        network, report = castle(
            network,
            stages,
            keep=keep,
            grid=grid,
            deploy=deploy,
            return_report=True,
            **attention,
        )
        _freeze_alike(network, report)
        if any(name in shapes for name in report.dropped) and callable(
            getattr(network, "init_weights", None)
        ):
            dropped = {name: shapes[name] for name in report.dropped}
            network.init_weights = _InitWeights(network, dropped)
        return switch_to_deploy(network, inplace=True) if deploy else network

    @staticmethod
    def deployed_config(config: dict[str, Any]) -> dict[str, Any]:
        """The config of the deployed form, which names no weights to start from."""
        backbone = {k: v for k, v in config["backbone"].items() if k not in _STARTS}
        return {**config, "backbone": backbone, "deploy": True}


def _build(config: dict[str, Any]) -> nn.Module:
    kind = config.get("type") if isinstance(config, Mapping) else None
    if kind is None:
        raise OptionError(
            f"Castled(backbone={config!r}): expected the config of a backbone, such as "
            "dict(type='mmdet.SwinTransformer')"
        )
    scope = kind.partition(".")[0] if isinstance(kind, str) and "." in kind else None
    if scope in _PACKAGES and not importlib.util.find_spec(scope):
        raise UnavailableError(
            f"Castled: {kind} needs {scope}: pip install {_PACKAGES[scope]}"
        )
    with MODELS.switch_scope_and_registry(None) as registry:
        if isinstance(kind, str) and registry.get(kind) is None:
            raise OptionError(
                f"Castled: the backbone {kind!r} is not known in the scope "
                f"{registry.scope!r}: check its name, and say whose it is, such as "
                "'mmdet.SwinTransformer'"
            )
    try:
        return MODELS.build(config)
    except (ImportError, OSError) as error:  # a package, or weights to start from
        raise UnavailableError(f"Castled: {kind} cannot be built: {error}") from error


def _freeze_alike(network: nn.Module, report: CastleReport) -> None:
    """Freeze what castling has added to attentions that a backbone has frozen."""
    new = set(report.new)
    for item in report.castled:
        attention = network.get_submodule(item.name)
        own = dict(attention.named_parameters())
        kept = [p for name, p in own.items() if f"{item.name}.{name}" not in new]
        if kept and not any(p.requires_grad for p in kept):
            attention.requires_grad_(False)


class _InitWeights:
    """``network.init_weights()`` of its class, which may ask for what was dropped.

    Swin and BEiT resize each table of biases in a file to that in their state dict.
    """

    def __init__(self, network: nn.Module, dropped: dict[str, Tensor]) -> None:
        self.network, self.dropped = network, dropped

    def __call__(self) -> None:
        kind = type(self.network)

        def state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return {**self.dropped, **kind.state_dict(self.network, *args, **kwargs)}

        with mock.patch.object(self.network, "state_dict", state_dict):
            kind.init_weights(self.network)
