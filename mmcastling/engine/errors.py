"""Errors that a person can act on, and how the command line shows them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import mmengine.registry

TRACEBACK_VARIABLE = "MMCASTLING_TRACEBACK"

_PACKAGE = str(Path(__file__).resolve().parents[1])
_REGISTRY = str(Path(mmengine.registry.__file__).resolve().parent)


class ConfigError(ValueError):
    """A config, or an option that changes it, which cannot work."""


def is_meant_for_the_user(error: BaseException | None) -> bool:
    """Whether an error is a message to the person who runs a command.

    It is where this package raised it, or where MMEngine's registries do not know a
    type or its arguments. They may raise what a constructor raised anew with the
    class's name in front, so the chain of causes is searched. An error from anywhere
    else, torch's in our lines included, is a defect and keeps its traceback.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and (
            _is_raised_here(error, frames[-1]) or _is_unbuildable(error, frames[-1])
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_raised_here(error: BaseException, frame: traceback.FrameSummary) -> bool:
    if isinstance(error, ConfigError):  # a command may raise it too
        return True
    return (
        isinstance(error, (ValueError, RuntimeError))
        and frame.filename.startswith(_PACKAGE)
        and (frame.line or "raise").startswith("raise")
    )


def _is_unbuildable(error: BaseException, frame: traceback.FrameSummary) -> bool:
    return isinstance(error, (KeyError, TypeError)) and frame.filename.startswith(
        _REGISTRY
    )


def _message(error: Exception) -> str:
    if isinstance(error, (KeyError, TypeError)):
        return (
            f"the config cannot be built: {error.args[0]}; correct that name, or "
            "remove it"
        )
    return str(error)


def run_cli(main: Callable[[], None]) -> None:
    """Run a command: a user's error ends it with one paragraph and exit status 1.

    Set ``MMCASTLING_TRACEBACK=1`` to see where it came from.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not is_meant_for_the_user(error):
            raise
        sys.stdout.flush()
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(1)
