"""The same file in lower precision, and which is the fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcastling.analysis import paired_medians
from mmcastling.deploy import AUTO, PrecisionChoice, fastest
from mmcastling.deploy.choosing import NEAR
from mmcastling.deploy.precision import gains_nothing
from mmcastling.errors import UserError
from mmcastling.export.agreement import TOLERANCE, Agreement
from mmcastling.export.formats import FORMAT_PRECISIONS, check_export_precision
from mmcastling.export.proving import ROUNDS

MOST_LOST = 0.25  # detections without a partner in float32 in a file that auto keeps


def precisions_to_write(
    precision: str, format: str
) -> tuple[list[str], dict[str, str]]:
    """The precisions below float32 to write a file in, and why not in others.

    Args:
        precision: One of those that a format has, or ``'auto'``.
        format: A key of :data:`FORMAT_PRECISIONS`.

    Raises:
        UserError: If the one asked for is not known or cannot be made here.
    """
    if precision != AUTO:
        check_export_precision(precision, format)
        return [precision] * (precision != "fp32"), {}
    names, left_out = [], {}
    for name in FORMAT_PRECISIONS[format][1:]:
        try:
            check_export_precision(name, format)
        except UserError as error:
            left_out[name] = f"is left out ({error})"
        else:
            if format == "exported-program" and gains_nothing(name):
                left_out[name] = "gains nothing here"
            else:
                names.append(name)
    return names, left_out


def lower_file(
    path: Path,
    precision: str,
    to_write: tuple[Sequence[str], dict[str, str]],
    *,
    make: Callable[[str, Path], None],
    compare: Callable[[Path, str], Mapping[str, Agreement]],
    run_of: Callable[[Path], Callable[[], Any]],
    size: tuple[int, int],
    say: Callable[[str], None],
) -> tuple[str, Path]:
    """Write a file in lower precision, or in each, and take the fastest.

    Args:
        path: The file in float32, in a folder of its own.
        precision: What was asked for.
        to_write: What :func:`precisions_to_write` gave for it.
        make: Writes the file of a precision to a path.
        compare: How far such a file is from torch, by where it was compared.
        run_of: A pass of a file, whose time decides.
        size: ``(H, W)`` of that pass.
        say: Called with the line that says what was chosen and why.

    Returns:
        The precision, and its file.
    """
    names, left_out = to_write[0], dict(to_write[1])
    files = {"fp32": path}
    for name in names:
        made = path.parent / name / path.name
        made.parent.mkdir()
        make(name, made)
        agreements = compare(made, name).values()
        if precision != AUTO or all(map(is_near, agreements)):
            files[name] = made
        else:
            left_out[name] = "is too far from torch"
    if precision == AUTO:
        passes = {name: run_of(file) for name, file in files.items()}
        seconds = paired_medians(passes, ROUNDS)
        precision = fastest(seconds)
        say(str(PrecisionChoice(precision, seconds, left_out, size)))
    return precision, files[precision]


def is_near(found: Agreement) -> bool:
    """Whether a file in lower precision is near enough to be chosen."""
    if found.found is not None:
        total = found.matched + found.unmatched
        return found.unmatched <= MOST_LOST * total
    return found.difference <= NEAR * found.limit / TOLERANCE
