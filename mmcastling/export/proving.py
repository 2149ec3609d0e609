"""A file is written aside, run and compared, and takes its place only if that agrees.

What is exported, of the toolboxes or any other module, goes through here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmcastling.analysis import paired_medians
from mmcastling.errors import CheckpointError, ConfigError
from mmcastling.export.agreement import Agreement
from mmcastling.export.formats import FORMATS, UnsupportedModelError
from mmcastling.files import check_writable, replace_together, temporary_folder
from mmcastling.runtime import SUFFIXES

ROUNDS = 3  # passes whose median is the latency that is told


class DisagreementError(UnsupportedModelError):
    """A file that was written and ran, and does not compute what torch computes."""


def destination(path: str | os.PathLike[str], format: str) -> Path:
    """The path of a file of a format that may be written.

    Raises:
        ConfigError: If it may not, or has another format's ending.
    """
    path, suffix = Path(path), FORMATS[format]
    if path.suffix != suffix:
        raise ConfigError(f"output {path} must end in {suffix}, as {format} files do")
    if format == "openvino":
        check_writable(path.with_suffix(".bin"), option="the weights of OUT")
    return check_writable(path, option="OUT")


def write_proven(
    out: Path,
    write: Callable[[Path], Any],
    compare: Callable[[Path], dict[str, Agreement]],
    finish: Callable[[Path], Path] | None = None,
) -> dict[str, Agreement]:
    """Write a file, and those beside it, if what it computes agrees with torch.

    Args:
        out: Where it shall lie.
        write: Writes it to the path that it is given.
        compare: How far such a file is from torch, by where it was compared.
        finish: Called with a file that agrees, for what else there is to do. Returns
            the file to keep, which may lie in another folder. Defaults to None.

    Returns:
        What ``compare`` found.

    Raises:
        DisagreementError: If it disagrees; nothing is left of it then.
        CheckpointError: If it cannot be written.
    """
    runtime = SUFFIXES[out.suffix][0]
    try:
        with temporary_folder(out) as folder:
            path = folder / out.name
            write(path)
            agreements = compare(path)
            if not all(agreement.holds for agreement in agreements.values()):
                apart = "; ".join(f"{at}: {how}" for at, how in agreements.items())
                raise DisagreementError(
                    f"the exported file disagrees with torch in {runtime} ({apart}) "
                    "and has been removed: export in another --format or --opset, or "
                    "the backbone alone with --part backbone"
                )
            if finish is not None:
                path = finish(path)
            # All that was written, the file that names the others last.
            made = [x for x in path.parent.iterdir() if x.is_file()]
            made.sort(key=lambda x: x.name == out.name)
            replace_together(path.parent, [out.parent / x.name for x in made])
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    return agreements


def latency(
    at: str, runtime: str, in_torch: Callable[[], Any], in_runtime: Callable[[], Any]
) -> str:
    """A line with the median milliseconds of both, timed in turns."""
    passes = {"torch": in_torch, runtime: in_runtime}
    medians = paired_medians(passes, ROUNDS).items()
    times = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in medians)
    return f"latency at {at}: {times}"
