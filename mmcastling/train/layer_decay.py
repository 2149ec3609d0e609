"""Layer-wise learning-rate decay for backbones inside any OpenMMLab model.

A pre-trained layer ``n`` steps below the top gets the learning rate times ``rate ** n``
(BEiT, MAE, ViTDet). Of the toolboxes' own constructors mmpretrain's asks the whole
model for its depths, which a detector cannot answer, and mmdet's and mmseg's know a few
backbones by name. This one asks the backbone it finds inside the model, or counts the
blocks with attentions of one that was castled.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger, print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmcastling.attention import TokenMixer
from mmcastling.castle.swap import softmax_attentions
from mmcastling.errors import OptionError
from mmcastling.registry import OPTIM_WRAPPER_CONSTRUCTORS

#: Parameters without weight decay wherever they are: class and distillation tokens and
#: absolute position embeddings, by the last part of their name (as BEiT and ViTDet).
NO_DECAY_NAMES = ("cls_token", "dist_token", "pos_embed", "absolute_pos_embed")


# The name of a block begins that of an attention and ends with a number.
_BLOCK = re.compile(r"(.*\.)?\w*\d(?=\.|$)")


def layer_scale(name: str, depth: int, num_layers: int, rate: float) -> float:
    """Learning-rate multiplier of the parameter ``name`` of a backbone: 1 at the top.

    ``depth`` 0 is the stem (patch and position embedding), ``num_layers - 1`` whatever
    follows the last block. Raises OptionError if it, or ``rate``, is out of range.
    """
    if not 0 < rate <= 1:
        raise OptionError(f"layer_decay_rate must be in (0, 1], got {rate!r}.")
    if not 0 <= depth < num_layers:
        raise OptionError(
            f"layer of {name!r} must be in [0, {num_layers}), got {depth}; "
            "check the backbone's get_layer_depth()."
        )
    return rate ** (num_layers - 1 - depth)


class AttentionBlocks:
    """The layers of a castled backbone that does not number them itself.

    One for each block that holds an attention, in their order; what lies between two
    blocks is of the first of them.
    """

    def __init__(self, backbone: nn.Module) -> None:
        mixers = [n for n, m in backbone.named_modules() if isinstance(m, TokenMixer)]
        attentions = [*mixers, *softmax_attentions(backbone)]
        blocks = {m[0] for m in map(_BLOCK.match, attentions) if m}
        self._depths: dict[str, int] = {}
        begun: list[str] = []
        for name, _ in backbone.named_parameters():
            name = _unwrapped(name)
            block = (m := _BLOCK.match(name)) and m[0]
            while block and block not in blocks:  # a number inside of a block
                block = (m := _BLOCK.match(block.rpartition(".")[0])) and m[0]
            if block and block not in begun:
                begun.append(block)
            after = not block and len(begun) == len(blocks)
            self._depths[name] = len(begun) + after
        self._count = len(blocks) + 2

    def get_layer_depth(self, param_name: str, prefix: str) -> tuple[int, int]:
        """The layer of a parameter and the number of layers, as mmpretrain's."""
        return self._depths[param_name.removeprefix(prefix)], self._count


def find_layered_backbones(model: nn.Module) -> dict[str, Any]:
    """The outermost modules called ``backbone`` that have ``get_layer_depth``.

    By the prefix of their parameters (``'backbone.'``), which is ``''`` if the model is
    itself a backbone; of a castled one without that method its
    :class:`AttentionBlocks`. Raises OptionError if there is none.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        # named_modules comes parents first, so the outermost one is met first.
        if name.rpartition(".")[2] == "backbone" and not _unwrapped(name).startswith(
            tuple(found)
        ):
            if callable(getattr(module, "get_layer_depth", None)):
                found[f"{_unwrapped(name)}."] = module
            elif any(isinstance(part, TokenMixer) for part in module.modules()):
                found[f"{_unwrapped(name)}."] = AttentionBlocks(module)
    if found:
        return found
    # Last, because an image classifier has the method too, but only passes it on.
    if callable(getattr(model, "get_layer_depth", None)) and not hasattr(
        model, "backbone"
    ):
        return {"": model}
    backbone = getattr(model, "backbone", None)
    raise OptionError(
        f"{type(model).__name__} has no backbone with get_layer_depth(param_name, "
        f"prefix) (its backbone: {type(backbone).__name__}); layer-wise learning-rate "
        "decay needs it. Use a backbone that has it or another constructor."
    )


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Optimizer wrapper with layer-wise learning-rate decay in the backbone.

    The model, or the model inside a ``DistributedDataParallel``, holds one or more
    modules called ``backbone``, or is a backbone itself; each is asked for the layer of
    its parameters by ``backbone.get_layer_depth(param_name, prefix)``, mmpretrain's
    convention. Everything outside the backbones keeps the full learning rate.

    ``paramwise_cfg`` takes all the fields of MMEngine's
    ``DefaultOptimWrapperConstructor`` with their meaning there, and

    - ``layer_decay_rate`` (float): Required, in (0, 1]; 1 is no decay.
    - ``no_decay_names`` (Sequence[str]): Parameters without weight decay, by the last
      part of their name. A parameter that a key of ``custom_keys`` matches is left to
      that key. Defaults to ``NO_DECAY_NAMES``.

    ``lr_mult`` of ``custom_keys`` and ``bias_lr_mult`` multiply with the layer's scale.
    Frozen parameters (``requires_grad=False``) are left out, as MMEngine does; unlike
    there, a parameter shared by two modules raises an error unless
    ``bypass_duplicate=True``, since two layers may claim it.

    Parameters with equal settings share one group, about ``2 * (blocks + 2)`` groups
    in all; ``lr_scale`` and ``param_names`` stay in each. One table is logged in place
    of MMEngine's line for every parameter.

    Raises:
        OptionError: If ``layer_decay_rate`` is missing or not in (0, 1], the optimizer
            has no ``lr``, or, when called, the model no backbone that is asked.

    Example:
        >>> optim_wrapper = dict(
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1),
        ...     constructor='mmcastling.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.7, norm_decay_mult=0.0))
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if rate is None:
            raise OptionError(
                "paramwise_cfg must give layer_decay_rate, a number in (0, 1]; "
                f"got the keys {sorted(self.paramwise_cfg)}."
            )
        layer_scale("any", 0, 1, rate)
        if self.base_lr is None:
            raise OptionError(
                "layer-wise decay scales the learning rate: optimizer must give lr, "
                f"got {self.optimizer_cfg}."
            )

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs
    ) -> None:
        """Append the parameter groups of the model, or of a module of it."""
        if prefix:
            super().add_params(params, module, prefix=prefix, **kwargs)
            return
        backbones = find_layered_backbones(module)
        singles: list[dict] = []
        with _without_line_per_param():
            super().add_params(singles, module, **kwargs)
        names = {id(p): _unwrapped(name) for name, p in module.named_parameters()}
        keys = [id(single["params"][0]) for single in singles]
        if shared := [names[key] for key, n in Counter(keys).items() if n > 1]:
            raise OptionError(
                f"parameters {shared} are shared by several modules; set "
                "bypass_duplicate=True in paramwise_cfg to keep the first of each."
            )
        for single, key in zip(singles, keys, strict=True):
            self._set_scale(single, names[key], backbones)
        groups = _merge(singles, names)
        params.extend(groups)
        num_frozen = sum(not p.requires_grad for p in module.parameters())
        print_log(_table(groups, num_frozen), logger="current")

    def _set_scale(self, group: dict, name: str, backbones: dict[str, Any]) -> None:
        """Set learning rate, scale and weight decay of a group of one parameter."""
        scale = 1.0
        prefix = next((p for p in backbones if name.startswith(p)), None)
        if prefix is not None:
            depth, num_layers = backbones[prefix].get_layer_depth(name, prefix)
            rate = self.paramwise_cfg["layer_decay_rate"]
            scale = layer_scale(name, depth, num_layers, rate)
        group["lr"] = group.get("lr", self.base_lr) * scale
        group["lr_scale"] = scale
        if self.base_wd is not None:
            group.setdefault("weight_decay", self.base_wd)
        # The parent matches keys in f'{prefix}.{name}', a dot first at the top level.
        dotted = name if "." in name else f".{name}"
        if any(key in dotted for key in self.paramwise_cfg.get("custom_keys", {})):
            return
        no_decay = self.paramwise_cfg.get("no_decay_names", NO_DECAY_NAMES)
        if name.rpartition(".")[2] in no_decay:
            # Also where the config gives no weight decay: AdamW's default is not 0.
            group["weight_decay"] = 0.0


def _unwrapped(name: str) -> str:
    """A name without what FSDP puts into those of modules, and not of parameters."""
    return name.replace("_fsdp_wrapped_module.", "")


def _merge(singles: list[dict], names: dict[int, str]) -> list[dict]:
    """Join groups of one parameter whose settings are equal, lowest scale first."""
    merged: dict[tuple, dict] = {}
    for single in singles:
        settings = {key: value for key, value in single.items() if key != "params"}
        # By repr, since values that come through custom_keys need not be hashable.
        key = tuple(sorted((name, repr(value)) for name, value in settings.items()))
        group = merged.setdefault(key, dict(settings, params=[], param_names=[]))
        group["params"].extend(single["params"])
        group["param_names"].extend(names[id(p)] for p in single["params"])
    return sorted(merged.values(), key=lambda group: group["lr_scale"])


def _table(groups: list[dict], num_frozen: int) -> str:
    columns = f"{'lr scale':>10} {'lr':>10} {'weight decay':>12}"
    lines = [f"{columns} {'tensors':>8} {'params':>12}"]
    for group in groups:
        decay = group.get("weight_decay")
        lines.append(
            f"{group['lr_scale']:>10.4g} {group['lr']:>10.3g} "
            f"{'default' if decay is None else format(decay, '.3g'):>12} "
            f"{len(group['params']):>8} {sum(p.numel() for p in group['params']):>12,}"
        )
    if num_frozen:
        lines.append(f"left out: {num_frozen} tensors with requires_grad=False")
    return "parameter groups of layer-wise learning-rate decay:\n" + "\n".join(lines)


@contextmanager
def _without_line_per_param() -> Iterator[None]:
    """Keep MMEngine from logging hundreds of lines that the table sums up."""
    told = re.compile(
        "paramwise_options -- |.* is skipped since its requires_grad=False"
    )
    logger = MMLogger.get_current_instance()

    def keep(record: logging.LogRecord) -> bool:
        return not told.match(str(record.msg))

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
