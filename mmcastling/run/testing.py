"""Evaluate whatever file holds a model: what ``tools/test.py`` does."""

from __future__ import annotations

import os

from mmengine.config import Config
from mmengine.dist import is_main_process

from mmcastling.errors import ConfigError
from mmcastling.run.evaluation import Evaluation, evaluate
from mmcastling.run.exported import ExportedEvaluation, evaluate_exported
from mmcastling.runtime import SUFFIXES, is_exported


def evaluate_file(
    cfg: Config,
    path: str | os.PathLike[str],
    *,
    deploy: bool = True,
    precision: str | None = None,
    runtime: str | None = None,
    tta: bool = False,
) -> Evaluation | ExportedEvaluation:
    """Evaluate a checkpoint in torch, or an exported file in its runtime.

    Args:
        cfg: A config from :func:`mmcastling.run.load_config`.
        path: A checkpoint, or a file that ``tools/export.py`` wrote.
        deploy: See :func:`mmcastling.run.evaluate`. Defaults to True.
        precision: As there; an exported file has its own. Defaults to None.
        runtime: See :func:`mmcastling.run.evaluate_exported`. Defaults to None
            (torch for a checkpoint, the format's own for an exported file).
        tta: Whether the config was set up for test-time augmentation. Defaults to
            False.

    Raises:
        ConfigError: If an option does not go with the kind of file.
        Exception: What the two functions raise.
    """
    if is_exported(path):
        for given, option, why in (
            (not deploy, "--no-deploy", "holds the pruned graph only"),
            (precision is not None, f"--precision {precision}", "keeps its own"),
            (tta, "--tta", "takes one view of an image"),
        ):
            if given:
                raise ConfigError(
                    f"{option}: the exported file {path} {why}; leave the option out, "
                    "or evaluate the checkpoint"
                )
        if is_main_process():
            print("pruned nothing: an exported file holds the pruned graph", flush=True)
        return evaluate_exported(cfg, path, runtime)
    if runtime not in (None, "torch"):
        endings = [suffix for suffix, runs in SUFFIXES.items() if runtime in runs]
        raise ConfigError(
            f"--runtime {runtime} runs exported files ({' or '.join(endings)}), and "
            f"{path} is none: export the checkpoint with tools/export.py first, or "
            "leave the option out"
        )
    return evaluate(cfg, path, deploy=deploy, precision=precision)
