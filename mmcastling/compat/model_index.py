"""Our configs by name.

They lie beside the package in a checkout, and in ``mmcastling/.mim`` where it was
installed, with ``model-index.yml`` and the metafiles that it names.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from mmcastling.errors import OptionError, UnavailableError

PACKAGE = Path(__file__).resolve().parents[1]


def find_root() -> Path | None:
    """The folder that holds ``configs/`` and ``model-index.yml``, if there is one."""
    for folder in (PACKAGE.parent, PACKAGE / ".mim"):
        if (folder / "model-index.yml").is_file():
            return folder
    return None


def read(path: Path) -> dict[str, Any]:
    """What a metafile or the index says."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def models() -> dict[str, dict[str, Any]]:
    """What the metafiles say of each model, by name."""
    folder = _root()
    parts = read(folder / "model-index.yml")["Import"]
    entries = [entry for part in parts for entry in read(folder / part)["Models"]]
    return {entry["Name"]: entry for entry in entries}


def find_config(name: str) -> str:
    """The path of the config of a model, whose name in the metafile ``.py`` may follow.

    Raises:
        OptionError: If there is no such model; says which names are close.
        UnavailableError: If the configs are missing.
    """
    known = models()
    entry = known.get(name.removesuffix(".py"))
    if entry is None:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see configs/"
        raise OptionError(f"no model of mmcastling is called {name!r}: {hint}")
    return str(_root() / entry["Config"])


def _root() -> Path:
    if (folder := find_root()) is not None:
        return folder
    raise UnavailableError(
        f"no model-index.yml beside {PACKAGE} nor in its .mim: install mmcastling again"
    )
