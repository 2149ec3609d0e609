"""Errors that a person can act on, and how the command line shows them."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

TRACEBACK_VARIABLE = "MMCASTLING_TRACEBACK"

_PACKAGE = str(Path(__file__).resolve().parents[1])


class ConfigError(ValueError):
    """A config, or an option that changes it, which cannot work."""


def is_meant_for_the_user(error: BaseException | None) -> bool:
    """Whether this package raised the error, as a message to the person who runs it.

    MMEngine's registries raise what a constructor raised anew with the class's name in
    front, so the chain of causes is searched. An error from anywhere else is a defect
    and keeps its traceback.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if (
            isinstance(error, (ValueError, RuntimeError))
            and frames
            and frames[-1].filename.startswith(_PACKAGE)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def run_cli(main: Callable[[], None]) -> None:
    """Run a command: a user's error ends it with one paragraph and exit status 1.

    Set ``MMCASTLING_TRACEBACK=1`` to see where it came from.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not is_meant_for_the_user(error):
            raise
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
