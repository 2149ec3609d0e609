"""Folders that appear in one piece and can prove that they are complete.

A generated dataset is written into a hidden sibling and renamed at the end, so nobody
ever sees half of it. A manifest inside holds the hash of every file: it tells a whole
set from a damaged one, and our files from a stranger's before anything is deleted.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmcastling.data.dataset_error import DatasetError

MANIFEST = "manifest.json"


def write_manifest(folder: Path, stamp: dict[str, Any]) -> None:
    """Record ``stamp`` and the hash of every file in ``folder``."""
    manifest = {**stamp, "files": _hash_files(folder)}
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def is_complete(folder: Path, stamp: dict[str, Any], force: bool) -> bool:
    """Say whether ``folder`` already holds the stamped set, or may be written.

    Args:
        folder: Where the set should be.
        stamp: What the manifest of the wanted set starts with.
        force: Replace a set that this module wrote, whatever its state.

    Returns:
        True when the complete set is there; False when the folder may be (re)written.

    Raises:
        DatasetError: The folder holds something else, or something of ours that is
            not the wanted set while ``force`` is off.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    manifest = _read_manifest(folder)
    if manifest is None or manifest.get("format") != stamp["format"]:
        raise DatasetError(
            f"{folder} exists and was not made by this tool (it has no {MANIFEST} of "
            f"format {stamp['format']!r}); expected a new or empty folder. Choose "
            "another one with --out: --force does not delete what it did not make."
        )
    if force:
        strangers = sorted(_list_files(folder) - set(manifest["files"]) - {MANIFEST})
        if strangers:
            raise DatasetError(
                f"{folder} holds {len(strangers)} file(s) that this tool did not make "
                f"({', '.join(strangers[:3])}); --force would delete them. Move them "
                "away or choose another folder with --out."
            )
        return False
    if any(manifest.get(key) != value for key, value in stamp.items()):
        raise DatasetError(
            f"{folder} holds a set of another version ({_stamp_of(manifest)}); "
            f"expected {_stamp_of(stamp)}. Replace it with --force, or choose another "
            "folder with --out."
        )
    damaged = [
        name
        for name, digest in manifest["files"].items()
        if _hash_file(folder / name) != digest
    ]
    if damaged:
        raise DatasetError(
            f"{folder} is damaged: {len(damaged)} of {len(manifest['files'])} files "
            f"are missing or changed ({', '.join(damaged[:3])}). Rebuild it with "
            "--force."
        )
    return True


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block succeeds.

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
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            yield fresh
            _swap_in(fresh, target, Path(scratch) / "old")
    except OSError as error:
        raise DatasetError(
            f"{target} cannot be written ({error}); expected a writable place with "
            "room for the set. Nothing was left behind. Free some space, correct the "
            "permissions or choose another folder with --out."
        ) from error


def _swap_in(fresh: Path, target: Path, old: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    return manifest if known else None


def _stamp_of(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in manifest.items() if k != "files")


def _list_files(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in files}


def _hash_files(folder: Path) -> dict[str, str | None]:
    return {name: _hash_file(folder / name) for name in sorted(_list_files(folder))}


def _hash_file(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
