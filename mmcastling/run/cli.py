"""The options that the commands in ``tools/`` share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from mmcastling.deploy import PRECISIONS
from mmcastling.errors import ConfigError
from mmcastling.run.config import DATA_VARIABLE, load_config


class KeyValueAction(DictAction):
    """MMEngine's reading of ``KEY=VALUE``, with a usage error for what is not."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(*args, **kwargs)
        except (ValueError, AssertionError) as error:
            message = f"expected KEY=VALUE with balanced brackets ({error})"
            raise argparse.ArgumentError(self, message) from error


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config file and ``--cfg-options``."""
    parser.add_argument("config", help="config file, of any OpenMMLab toolbox")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=KeyValueAction,
        metavar="KEY=VALUE",
        help="override settings of the config; data_root=FOLDER moves its data. The "
        f"environment variable {DATA_VARIABLE} stands for the folder data/",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the work directory and the launcher."""
    parser.add_argument(
        "--work-dir", help="folder for logs and checkpoints (work_dirs/CONFIG)"
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="job launcher (none)",
    )
    # torch.distributed.launch passes it; torchrun sets the variable instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)


def add_precision_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--precision``; ``default`` says what happens without it."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help=f"what the layers of the deployed model compute in ({default})",
    )


def config_from_arguments(args: argparse.Namespace) -> Config:
    """Load the config that the arguments name, with their options."""
    cfg = load_config(args.config, args.cfg_options, getattr(args, "work_dir", None))
    if hasattr(args, "launcher"):
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
        cfg.launcher = args.launcher
    return cfg


def check_picture(out: Path | None) -> None:
    """Raise unless ``--out``, where given, names a PNG file that can be written.

    Raises:
        ConfigError: If not.
    """
    if out is None:
        return
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: pictures are PNG files, end the name in .png")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist, create it first")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file")
