"""Convert a training checkpoint for deployment: what ``tools/convert.py`` does."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from mmcastling.checkpoint import load_checkpoint, save_atomically
from mmcastling.deploy import (
    AUTO,
    PRECISIONS,
    check_precision,
    deploy_checkpoint,
    is_deployed,
    largest_difference,
    set_precision,
)
from mmcastling.errors import CheckpointError, ConfigError
from mmcastling.files import check_writable, replace_together, temporary_folder
from mmcastling.run.config import check_data, has_data
from mmcastling.run.load import (
    PruningReport,
    choose_precision,
    first_test_images,
    load_pruned_model,
)
from mmcastling.run.runner import drop_training_hooks

_MARK = "# Written by mmcastling's tools/convert.py, which may replace it.\n"
"""The first line of a config that a conversion wrote."""


def convert(
    cfg: Config,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    verify: bool | None = None,
    force: bool = False,
    ema: bool | None = None,
    num_images: int = 4,
    precision: str = "fp32",
) -> PruningReport:
    """Prune a trained model and write it with a config that builds it pruned.

    Args:
        cfg: The config that the checkpoint was trained with.
        source: The training checkpoint.
        out: Checkpoint to write; the config is written beside it as ``.py``.
        verify: Measure the largest difference on real images of the test set. Defaults
            to None (where the data is there).
        force: Write although the masks have not decayed.
        ema: See :func:`mmcastling.deploy.select_weights`.
        num_images: Images to verify on.
        precision: See :func:`mmcastling.deploy.set_precision`. The config names it, and
            the weights stay float32. ``'auto'`` is that of
            :func:`mmcastling.deploy.best_precision` on this machine, at the size of the
            first test image.

    Returns:
        What pruning removed and changed; it is printed, too.

    Raises:
        UserError: If source, output, precision or (with ``verify``) data cannot be
            used, the output would replace what no conversion wrote, or the masks have
            not decayed and ``force`` is not given.
    """
    if precision != AUTO:
        check_precision(precision)
    elif not has_data(cfg, "test"):
        raise ConfigError(
            "--precision auto measures at the size of a test image, and the config's "
            f"test data is not there: choose one of {list(PRECISIONS)}"
        )
    else:
        check_data(cfg, "test")
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve():
        raise CheckpointError(
            f"output {out} is the input: training state would be lost"
        )
    check_writable(out, ".pth", option="OUT.pth")
    config_path = check_writable(out.with_suffix(".py"), option="the config of OUT.pth")
    checkpoint = load_checkpoint(source)
    if is_deployed(checkpoint):
        raise CheckpointError(f"checkpoint {source} has been deployed already")
    if cfg.filename and config_path.resolve() == Path(cfg.filename).resolve():
        raise ConfigError(
            f"output {out} would put its config in place of the training config "
            f"{cfg.filename}: choose another name"
        )
    _check_replaceable(out, config_path)
    deployed, pruning = load_pruned_model(
        cfg, checkpoint, source, ema=ema, verify=verify, images=num_images
    )
    if pruning is None:
        raise ConfigError(
            "the config's model has no auxiliary branch to prune: nothing is castled, "
            "or it is built with deploy=True"
        )
    if not force:
        pruning.refuse_if_changed(source)

    facts = dict(source=source.name, max_abs_diff=pruning.difference)
    result = deploy_checkpoint(deployed, checkpoint.get("meta") or {}, **facts)
    print(pruning)
    deployed_cfg = deploy_config(cfg)
    if precision == AUTO:
        precision = choose_precision(cfg, deployed)
    if precision != "fp32":
        deployed_cfg.precision = precision
        lowered = copy.deepcopy(deployed)
        set_precision(lowered, precision)
        if pruning.images:
            images = first_test_images(cfg, deployed, num_images)
            change, magnitude = largest_difference(deployed, lowered, images)
            share = f"{change / magnitude:.2%}"
            print(f"{precision} changes them by up to {share} of the largest feature")
    _write_both(deployed_cfg, config_path, result, out)
    print(f"wrote {out} and {config_path}")
    return pruning


def _check_replaceable(weights: Path, config: Path) -> None:
    """Raise unless what is there was written by a conversion."""
    strange = []
    if config.exists() and not config.read_text(errors="replace").startswith(_MARK):
        strange.append(config)
    if weights.exists():
        try:
            is_ours = is_deployed(load_checkpoint(weights))
        except CheckpointError:
            is_ours = False
        strange += [] if is_ours else [weights]
    if strange:
        raise ConfigError(
            f"{' and '.join(map(str, strange))} would be replaced, and no conversion "
            "wrote it: choose another name for OUT.pth, or move it away"
        )


def _write_both(cfg: Config, config_path: Path, checkpoint: dict, out: Path) -> None:
    try:
        with temporary_folder(out) as folder:
            (folder / config_path.name).write_text(_MARK + cfg.pretty_text)
            save_atomically(checkpoint, folder / out.name)
            load_checkpoint(folder / out.name)  # proves that it loads
            replace_together(folder, [out, config_path])
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error


def deploy_config(cfg: Config) -> Config:
    """A copy of a config whose model is built pruned.

    Sets ``deploy=True`` wherever a registered module takes it, puts what a class that
    offers ``deployed_config(config)`` becomes in its place, and removes the training
    hooks and what names a checkpoint to start from. Needs the config's default scope.
    """
    cfg = copy.deepcopy(cfg)
    _set_deploy(cfg.model)
    drop_training_hooks(cfg)
    cfg.load_from, cfg.resume = None, False
    return cfg


def _set_deploy(node: Any) -> None:
    children = node if isinstance(node, (list, tuple)) else ()
    if isinstance(node, dict):
        kind = node.get("type")
        kind = MODELS.get(kind) if isinstance(kind, str) else kind
        if callable(deployed := getattr(kind, "deployed_config", None)):
            kept = deployed(dict(node))
            node.clear()
            node.update(kept)
            kind = MODELS.get(node["type"])
        if callable(kind) and "deploy" in inspect.signature(kind).parameters:
            node["deploy"] = True
            node.pop("init_cfg", None)
        children = node.values()
    for child in children:
        _set_deploy(child)
