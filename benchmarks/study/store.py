"""Runs on disk: one file each, written when the run ends, never mixed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmcastling.analysis.machine import environment
from mmcastling.checkpoint import write_json_atomically
from mmcastling.run import ConfigError


@dataclasses.dataclass(frozen=True)
class Run:
    """One training or evaluation with one seed.

    Args:
        group: Folder of its result, one per data set.
        name: What varies.
        seed: Of weights and of the data's order.
        settings: All that decides the result, as plain values for JSON.
    """

    group: str
    name: str
    seed: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.group}/{self.name}-seed{self.seed}"

    @property
    def digest(self) -> str:
        """A hash of the settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """The results of runs in a folder.

    Args:
        folder: Made when the first result is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        """Where a run's result is kept."""
        return self.folder / f"{run}.json"

    def load(self, run: Run) -> dict[str, Any] | None:
        """A run's result, None if it has not ended yet.

        Raises:
            ConfigError: If the file is damaged, or of a run with other settings.
        """
        path = self.path(run)
        if not path.is_file():
            return None
        try:
            stored = json.loads(path.read_text())
            settings, digest = stored["settings"], stored["settings_sha256"]
            result = stored["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no result of this study ({error!r}): remove it, and the "
                "run is repeated"
            ) from error
        if digest != run.digest:
            raise ConfigError(
                f"{path} was measured with other settings: "
                f"{_differences(settings, run.settings)}. Going on would mix results: "
                "repeat the command with the stored settings, store elsewhere with "
                f"--out FOLDER, or remove {path.parent} to begin anew"
            )
        return result

    def check(self, runs: Sequence[Run]) -> None:
        """Raise before anything is computed if a stored result has other settings."""
        for run in runs:
            self.load(run)

    def save(self, run: Run, result: dict[str, Any]) -> None:
        """Store a result, whole or not at all."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = dict(
            settings=run.settings,
            settings_sha256=run.digest,
            result=result,
            environment=environment(),
        )
        write_json_atomically(path, content)


def _differences(stored: Any, wanted: Any) -> str:
    old, new = dict(_leaves(stored)), dict(_leaves(wanted))
    changed = [
        f"{key} was {old.get(key, 'absent')!r}, is {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more


_ABSENT = object()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items: Any
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and value:
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))
