"""How the command line shows errors that a person can act on."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed
from torch.distributed import DistError, TCPStore

from mmcastling.errors import UserError

TRACEBACK_VARIABLE = "MMCASTLING_TRACEBACK"

# How many processes a launcher has started. Among several, one that waits for another
# has to end at once.
_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_TOOLBOXES = ("mmengine", "mmcv", "mmdet", "mmpretrain", "mmseg")
# What gloo says, in a plain RuntimeError, of a process that has ended.
_LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def is_meant_for_the_user(error: BaseException | None) -> bool:
    """Whether an error is a message to the person who runs a command.

    It is a :class:`UserError`, a toolbox that is not installed, or MMEngine's
    registries do not know a type or its arguments. Some releases raise what a
    constructor raised anew with the class's name in front, so the chain of causes is
    searched. Anything else is a defect.
    """
    registry = sys.modules.get("mmengine.registry")  # imported where a config is
    folder = str(Path(registry.__file__).resolve().parent) if registry else None
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        # Registries have no error of their own.
        by_registry = folder and frames and frames[-1].filename.startswith(folder)
        if (
            isinstance(error, UserError)
            or _lacks_toolbox(error)
            or (isinstance(error, (KeyError, TypeError)) and by_registry)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _lacks_toolbox(error: BaseException) -> bool:
    name = getattr(error, "name", None) if isinstance(error, ImportError) else None
    return (name or "").partition(".")[0] in _TOOLBOXES


def rank_and_size() -> tuple[int, int]:
    """Which of how many processes this is."""
    if not _is_distributed():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _has_lost_contact(error: Exception) -> bool:
    """Whether another process of this run ended first, so that this one had to."""
    lost = any(text in str(error) for text in _LOST_CONTACT)
    return rank_and_size()[1] > 1 and (lost or isinstance(error, DistError))


def _is_said_already(error: Exception) -> bool:
    """Whether another process of this launch has met the same error and says it.

    torchrun keeps a store that outlives its processes: the first to write there speaks.
    Other launchers have none, so all processes speak.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=10),
        )
        return store.add(f"mmcastling/{attempt}/{error!r}", 1) > 1
    except (DistError, KeyError, RuntimeError, ValueError):
        return False  # better said twice than not at all


def run_cli(main: Callable[[], None]) -> None:
    """Run a command: a user's error ends it with one paragraph and exit status 1.

    What several processes meet alike is said by one of them. Set
    ``MMCASTLING_TRACEBACK=1`` to see where each error came from. A process that runs
    alone removes what it left unfinished when it is told to end (``kill``).
    """
    former = signal.getsignal(signal.SIGTERM)
    if all(os.environ.get(name, "1") == "1" for name in _SIZES):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main()
        # A process that ends while another still reads from it, or with its threads
        # running, can abort at exit, and launchers then report the run as failed.
        if _is_distributed():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        rank, size = rank_and_size()
        if _has_lost_contact(error):
            text = (
                "lost contact to another process: the reason is what that one says, or "
                "what killed it"
            )
        elif _is_said_already(error):
            sys.exit(1)
        elif not is_meant_for_the_user(error):
            raise
        elif _lacks_toolbox(error):
            text = f"configs need OpenMMLab ({error}): pip install -e . in the clone"
        elif isinstance(error, (KeyError, TypeError)):
            text = (
                f"the config cannot be built: {error.args[0]}; correct that name, or "
                "remove it"
            )
        else:
            text = str(error)
        where = f"[process {rank + 1} of {size}] " if size > 1 else ""
        sys.stdout.flush()
        print(f"error: {where}{text}", file=sys.stderr)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, former)
