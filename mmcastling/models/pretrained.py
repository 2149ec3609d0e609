"""``init_cfg=dict(type='Pretrained', ...)`` of a backbone, and no silence about it.

MMEngine loads such weights with ``strict=False`` and logs what did not fit: weights of
another architecture or with another library's names leave a backbone as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.model import PretrainedInit
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmcastling.attention.old_names import with_current_names
from mmcastling.checkpoint import CheckpointError, weights_of

REQUIRED_SHARE = 0.5
"""Share of a backbone's parameters that weights for it must hold, and of those of its
attentions by themselves: MLPs, which any network of the family has, are most of it."""

_ADVICE = (
    "Import weights of other libraries with tools/model_converters/import_vit.py, "
    "import_levit.py or import_mvit.py"
)


def pretrained_cfgs(init_cfg: Any) -> Iterator[dict[str, Any]]:
    """Yield the entries of an ``init_cfg`` that load weights."""
    for cfg in init_cfg if isinstance(init_cfg, list | tuple) else [init_cfg]:
        if cfg and cfg.get("type") in ("Pretrained", "PretrainedInit", PretrainedInit):
            yield cfg


def check_pretrained(
    backbone: nn.Module, checkpoint: str, prefix: str | None = None
) -> None:
    """Raise if a checkpoint holds less than half of a backbone, or of its attentions.

    Args:
        backbone: The backbone that is about to load it.
        checkpoint: Path or URL, as in MMEngine's ``PretrainedInit``.
        prefix: What stands before the backbone's names. Defaults to None.

    Raises:
        CheckpointError: If it does, or its position embedding cannot be resized.
    """
    whose = f"init_cfg of {type(backbone).__name__}: {checkpoint}"
    loaded = CheckpointLoader.load_checkpoint(checkpoint, "cpu", "silent")
    try:
        weights = weights_of(loaded)
    except CheckpointError as error:
        raise CheckpointError(f"{whose}: {error}. {_ADVICE}") from error
    start = "" if prefix is None else prefix.removesuffix(".") + "."
    found = {
        name.removeprefix(start): value
        for name, value in weights.items()
        if name.startswith(start) and isinstance(value, Tensor)
    }
    try:
        found = _prepared(backbone, found)
    except AssertionError as error:  # mmpretrain's, of the position embedding
        raise CheckpointError(
            f"{whose}: its position embedding cannot be resized, as it is of no square "
            "image. Import it with the --img-size of the backbone"
        ) from error
    own = dict(backbone.named_parameters())
    fits = {n for n, p in own.items() if n in found and found[n].shape == p.shape}
    groups = {"its": set(own), "its attentions'": _attention_parameters(backbone)}
    shares = {
        what: _elements(own, fits & names) / max(1, _elements(own, names))
        for what, names in groups.items()
        if names
    }
    what = next((what for what in shares if shares[what] < REQUIRED_SHARE), None)
    if what is None:
        return
    names = groups[what]
    shapes = [
        f"{n} is {tuple(found[n].shape)}, expected {tuple(p.shape)}"
        for n, p in own.items()
        if n in found and n in names - fits
    ]
    missing = [f"no {name}" for name in own if name in names and name not in found]
    named = f" under the prefix {prefix!r}" if prefix is not None else ""
    raise CheckpointError(
        f"{whose} has only {len(fits & names)} of {what} {len(names)} parameters"
        f"{named} ({shares[what]:.1%} of their elements; at least {REQUIRED_SHARE:.0%} "
        f"are needed): "
        f"{'; '.join((shapes + missing)[:4])}; the file's names begin with "
        f"{list(weights)[:2]}. {_ADVICE}, and check arch and prefix"
    )


def _elements(parameters: dict[str, nn.Parameter], names: set[str]) -> int:
    return sum(parameters[name].numel() for name in names)


def _attention_parameters(backbone: nn.Module) -> set[str]:
    """Names of parameters in modules that project to queries, keys and values."""
    return {
        f"{name}.{parameter}"
        for name, module in backbone.named_modules()
        if hasattr(module, "proj") and (hasattr(module, "qkv") or hasattr(module, "kv"))
        for parameter, _ in module.named_parameters()
    }


def _prepared(backbone: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the modules' own hooks, which resize tables, would pass them."""
    weights = with_current_names(weights, backbone.state_dict())
    for name, module in backbone.named_modules():
        prefix = f"{name}." if name else ""
        for hook in module._load_state_dict_pre_hooks.values():
            hook(weights, prefix, {}, False, [], [], [])
    return weights
