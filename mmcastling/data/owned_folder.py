"""Folders that appear in one piece and can prove that they are complete.

A generated dataset is written into a hidden sibling and renamed at the end, so nobody
ever sees half of it. A manifest inside holds the hash of every file: it tells a whole
set from a damaged one, and our files from a stranger's before anything is deleted.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from mmcastling.data.problems import DatasetError

MANIFEST = "manifest.json"


def write_manifest(folder: Path, stamp: dict[str, Any]) -> None:
    """Record ``stamp`` and the hash of every file in ``folder``."""
    text = json.dumps({**stamp, "files": _hashes(folder)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def is_complete(folder: Path, stamp: dict[str, Any], force: bool) -> bool:
    """Say whether ``folder`` already holds the stamped set, or may be written.

    Args:
        folder: Where the set should be.
        stamp: What the manifest of the wanted set starts with.
        force: Replace a set that this module wrote, whatever its state.

    Raises:
        DatasetError: The folder holds something else, or something of ours that is
            not the wanted set while ``force`` is off.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = _read_manifest(folder)
    if found.get("format") != stamp["format"]:
        raise DatasetError(
            f"{folder} exists and was not made by this tool (it has no {MANIFEST} of "
            f"format {stamp['format']!r}); expected a new or empty folder. Choose "
            "another one with --out: --force does not delete what it did not make."
        )
    hashes, now = found.pop("files"), _hashes(folder)
    if force:
        strangers = sorted(now.keys() - hashes.keys() - {MANIFEST})
        if strangers:
            raise DatasetError(
                f"{folder} holds {len(strangers)} file(s) that this tool did not make "
                f"({', '.join(strangers[:3])}); --force would delete them. Move them "
                "away or choose another folder with --out."
            )
        return False
    if found != stamp:
        was, wanted = (
            ", ".join(f"{key} {value}" for key, value in items.items())
            for items in (found, stamp)
        )
        raise DatasetError(
            f"{folder} holds a set of another version ({was}); expected {wanted}. "
            "Replace it with --force, or choose another folder with --out."
        )
    damaged = [name for name, old in hashes.items() if now.get(name) != old]
    if damaged:
        raise DatasetError(
            f"{folder} is damaged: {len(damaged)} of {len(hashes)} files are missing "
            f"or changed ({', '.join(damaged[:3])}). Rebuild it with --force."
        )
    return True


@contextmanager
def staged_folder(target: Path, stamp: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target``, stamped, when the block succeeds.

    An exception inside the block, KeyboardInterrupt included, removes what was written
    and leaves ``target`` as it was. An older ``target`` is replaced at the very end.

    Raises:
        DatasetError: The folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, since a rename is atomic only within one file system.
        prefix = f".{target.name}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
            # One level down, because mkdtemp's own folder is private to its owner.
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            fresh.mkdir()
            yield fresh
            write_manifest(fresh, stamp)
            if target.exists():
                target.rename(old)
            try:
                fresh.rename(target)
            finally:
                if not target.exists() and old.exists():
                    old.rename(target)
    except OSError as error:
        raise DatasetError(
            f"{target} cannot be written ({error}); expected a writable place with "
            "room for the set. Nothing was left behind. Free some space, correct the "
            "permissions or choose another folder with --out."
        ) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, or nothing where there is none with hashes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if isinstance(manifest["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
