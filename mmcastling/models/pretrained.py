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
from mmcastling.checkpoint import load_checkpoint, weights_of
from mmcastling.compat.safe_loading import safe_mmengine_loading
from mmcastling.deploy import is_deployed
from mmcastling.errors import CheckpointError

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


def read_checkpoint(source: str) -> dict[str, Any]:
    """Load a checkpoint from wherever MMEngine can, without unpickling code."""
    if "://" not in str(source):
        return load_checkpoint(source)
    with safe_mmengine_loading():
        return CheckpointLoader.load_checkpoint(source, "cpu", "silent")


def check_pretrained(
    backbone: nn.Module, checkpoint: str, prefix: str | None = None
) -> None:
    """Raise CheckpointError for weights of less than half of a backbone.

    Or of its attentions, or with a position embedding that cannot be resized.
    ``checkpoint`` and ``prefix`` are as in MMEngine's ``PretrainedInit``.
    """
    whose = f"init_cfg of {type(backbone).__name__}: {checkpoint}"
    loaded = CheckpointLoader.load_checkpoint(checkpoint, "cpu", "silent")
    _check_share(backbone, loaded, whose, prefix)


def check_start(model: nn.Module, checkpoint: dict[str, Any], source: str) -> None:
    """Raise CheckpointError for weights that a model cannot start from (``load_from``).

    Its backbone must be filled as :func:`check_pretrained` demands; the rest, of other
    classes perhaps, may begin anew, which MMEngine's log lists.
    """
    has_backbone = isinstance(getattr(model, "backbone", None), nn.Module)
    _check_share(
        model.backbone if has_backbone else model,
        checkpoint,
        f"load_from {source}",
        "backbone" if has_backbone else None,
    )


def _check_share(
    backbone: nn.Module, checkpoint: dict[str, Any], whose: str, prefix: str | None
) -> None:
    if is_deployed(checkpoint) and not getattr(backbone, "deploy", False):
        raise CheckpointError(
            f"{whose} has been deployed: layers were folded into others, so training "
            "cannot start from it. Start from the training checkpoint that it was "
            "converted from"
        )
    start = "" if prefix is None else prefix.removesuffix(".") + "."
    try:
        weights = weights_of(checkpoint)
        inside = {
            name.removeprefix(start): value
            for name, value in weights.items()
            if name.startswith(start) and isinstance(value, Tensor)
        }
        found = prepared_weights(backbone, inside)
    except CheckpointError as error:
        raise CheckpointError(f"{whose}: {error}. {_ADVICE}") from error
    own = dict(backbone.named_parameters())
    attentions = [
        f"{name}."
        for name, module in backbone.named_modules()
        if hasattr(module, "proj") and (hasattr(module, "qkv") or hasattr(module, "kv"))
    ]
    for what, names in (
        ("its", list(own)),
        ("its attentions'", [n for n in own if n.startswith(tuple(attentions))]),
    ):
        fits = [n for n in names if n in found and found[n].shape == own[n].shape]
        total = sum(own[n].numel() for n in names)
        share = sum(own[n].numel() for n in fits) / max(1, total)
        if names and share < REQUIRED_SHARE:
            misses = [
                f"{n} is {tuple(found[n].shape)}, expected {tuple(own[n].shape)}"
                if n in found
                else f"no {n}"
                for n in names
                if n not in fits
            ]
            named = f" under the prefix {prefix!r}" if prefix is not None else ""
            raise CheckpointError(
                f"{whose} has only {len(fits)} of {what} {len(names)} parameters"
                f"{named} ({share:.1%} of their elements; at least "
                f"{REQUIRED_SHARE:.0%} are needed): {'; '.join(misses[:4])}; the "
                f"file's names begin with {list(weights)[:2]}. {_ADVICE}, and check "
                "arch and prefix"
            )


def prepared_weights(
    module: nn.Module, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Weights as the hooks of a module, which resize tables, would pass them to it."""
    weights = with_current_names(weights, module.state_dict())
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        for hook in part._load_state_dict_pre_hooks.values():
            hook(weights, prefix, {}, False, [], [], [])
    return weights
