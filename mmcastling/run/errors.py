"""Errors that a person can act on, and how the command line shows them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import mmengine.registry
import torch.distributed
from mmengine.dist import barrier, get_dist_info, is_distributed
from torch.distributed import DistError

TRACEBACK_VARIABLE = "MMCASTLING_TRACEBACK"

_PACKAGE = str(Path(__file__).resolve().parents[1])
_REGISTRY = str(Path(mmengine.registry.__file__).resolve().parent)


_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
# What gloo says, in a plain RuntimeError, of a process that has ended.
_LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


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


def _let_the_first_speak(error: Exception) -> None:
    """Wait where another process will have said what is wrong.

    Launchers end all processes when one has failed. Those that meet the same error as
    the first, or only lost contact to one that failed, are ended while they wait, so
    that one message is left.
    """
    ranks = (os.environ[name] for name in _RANK_VARIABLES if name in os.environ)
    if int(next(ranks, "0")) > 0:
        time.sleep(5.0)
    several = get_dist_info()[1] > 1
    lost = several and any(text in str(error) for text in _LOST_CONTACT)
    if lost or isinstance(error, DistError):
        time.sleep(10.0)


def _leave_together() -> None:
    """End the process group once all processes are done.

    One that ends while another still reads from it, or with its threads running, can
    abort at exit, and launchers then report the whole run as failed.
    """
    if is_distributed():
        barrier()
        torch.distributed.destroy_process_group()


def run_cli(main: Callable[[], None]) -> None:
    """Run a command: a user's error ends it with one paragraph and exit status 1.

    Set ``MMCASTLING_TRACEBACK=1`` to see where it came from.
    """
    try:
        main()
        _leave_together()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _let_the_first_speak(error)
        if os.environ.get(TRACEBACK_VARIABLE) or not is_meant_for_the_user(error):
            raise
        rank, size = get_dist_info()
        where = f"[process {rank + 1} of {size}] " if size > 1 else ""
        sys.stdout.flush()
        print(f"error: {where}{_message(error)}", file=sys.stderr)
        sys.exit(1)
