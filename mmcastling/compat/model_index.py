"""Our configs by name: for MMEngine's ``mmcastling::...``, all toolboxes and scripts.

The configs lie beside the package in a checkout, and in ``mmcastling/.mim`` where it
was installed, with ``model-index.yml`` and the metafiles that it names.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import load
from mmengine.infer import BaseInferencer
from mmengine.utils import is_installed
from mmpretrain.apis.model import ModelHub

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE.parent, PACKAGE / ".mim")
CLASSIFIERS = "configs/metafile_classification.yml"
METAFILES = {
    "mmdet": "configs/metafile_detection.yml",
    "mmseg": "configs/metafile_segmentation.yml",
}
"""Whose inferencers know the models of a metafile; mmpretrain's have a way of their
own."""


def root() -> Path:
    """The folder that holds ``configs/`` and ``model-index.yml``.

    Raises:
        FileNotFoundError: If there is none: the installation is not complete.
    """
    for folder in FOLDERS:
        if (folder / "model-index.yml").is_file():
            return folder
    raise FileNotFoundError(
        f"no model-index.yml beside {PACKAGE} nor in its .mim: install mmcastling again"
    )


def models() -> dict[str, dict[str, Any]]:
    """What the metafile says of each model, by name."""
    folder = root()
    index = load(folder / "model-index.yml")
    entries = [
        entry for part in index["Import"] for entry in load(folder / part)["Models"]
    ]
    return {entry["Name"]: entry for entry in entries}


def find_config(name: str) -> str:
    """The path of a model's config, for whatever takes one.

    Args:
        name: Name of a model, as in the metafile; ``.py`` may follow.

    Raises:
        ValueError: If there is no such model; says which names are close.
    """
    known = models()
    entry = known.get(name.removesuffix(".py"))
    if entry is None:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see configs/"
        raise ValueError(f"no model of mmcastling is called {name!r}: {hint}")
    return str(root() / entry["Config"])


def register_names() -> None:
    """Make our configs known by name where a toolbox allows it. Idempotent.

    Makes mmseg's known as well, ``mmseg::...``, whatever its distribution is called.
    MMEngine then resolves ``mmcastling::castling/NAME.py`` in a ``_base_`` and in
    ``mmengine.hub.get_config``, mmpretrain the names in ``get_model``, ``list_models``
    and its inferencers, and mmdet's and mmseg's inferencers those of detectors and
    segmentors.
    """
    MODULE2PACKAGE.setdefault("mmcastling", "mmcastling")
    # MMEngine looks for the distribution "mmsegmentation"; the maintained one has
    # another name, and is found by that of its module.
    if not is_installed(MODULE2PACKAGE["mmseg"]):
        MODULE2PACKAGE["mmseg"] = "mmseg"
    for folder in FOLDERS:
        file = folder / CLASSIFIERS
        if file.is_file():
            first = load(file)["Models"][0]["Name"]
            if not ModelHub.has(first):
                ModelHub.register_model_index(file, folder)
            _extend_inferencers()
            return  # where the package stands without configs, there is nothing to name


def _extend_inferencers() -> None:
    """Let MMEngine's inferencers find our models beside those of their toolbox.

    They read one list, that of the toolbox, and have no registry of further ones; so
    the function that reads it is wrapped, and ours follow what it yields.
    """
    theirs = BaseInferencer._get_models_from_metafile
    if getattr(theirs, "has_mmcastling", False):
        return

    @functools.wraps(theirs)
    def with_ours(dir: str) -> Iterator[dict[str, Any]]:
        yield from theirs(dir)
        folder = root()
        for toolbox, part in METAFILES.items():
            # A toolbox that is asked for its models has been imported.
            if (
                sys.modules.get(toolbox) is not None
                and (folder / part).is_file()
                and dir == BaseInferencer._get_repo_or_mim_dir(toolbox)
            ):
                for entry in load(folder / part)["Models"]:
                    yield {**entry, "Config": str(folder / entry["Config"])}

    with_ours.has_mmcastling = True
    BaseInferencer._get_models_from_metafile = staticmethod(with_ours)
