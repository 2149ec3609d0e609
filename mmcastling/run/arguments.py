"""Options that the commands in ``tools/`` share, read without OpenMMLab."""

from __future__ import annotations

import argparse
import ast
import os
from typing import Any

from mmcastling.deploy import AUTO, PRECISIONS
from mmcastling.named_models import is_model_name

DATA_VARIABLE = "MMCASTLING_DATA"
"""Environment variable that names the folder standing for ``data/`` in all configs."""


class KeyValueAction(argparse.Action):
    """MMEngine's reading of ``KEY=VALUE``, with a usage error for what is not."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        from mmengine.config import DictAction

        try:
            DictAction(self.option_strings, self.dest)(*args, **kwargs)
        except (ValueError, AssertionError) as error:
            message = f"expected KEY=VALUE with balanced brackets ({error})"
            raise argparse.ArgumentError(self, message) from error


def add_config_arguments(
    parser: argparse.ArgumentParser,
    what: str = "config file, of any OpenMMLab toolbox",
) -> None:
    """Add the config file and ``--cfg-options``."""
    parser.add_argument("config", help=what)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=KeyValueAction,
        metavar="KEY=VALUE",
        help="override settings of the config; data_root=FOLDER moves its data. The "
        f"environment variable {DATA_VARIABLE} stands for the folder data/",
    )


class LiteralAction(argparse.Action):
    """``KEY=VALUE``, a value of Python or else a text, without OpenMMLab.

    ``true`` and ``false`` are values, too, as in MMEngine's ``--cfg-options``.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for text in values:
            key, equals, value = text.partition("=")
            if not equals:
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {text!r}")
            if value in ("true", "false"):
                value = value.title()
            try:
                found[key] = ast.literal_eval(value)
            except (SyntaxError, ValueError):
                found[key] = value
        setattr(namespace, self.dest, found)


def add_named_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what models by name take, see :mod:`mmcastling.named_models`."""
    parser.add_argument(
        "--castle",
        nargs="*",
        action=LiteralAction,
        metavar="KEY=VALUE",
        help="castle a named model with these options (those in its checkpoint)",
    )
    parser.add_argument(
        "--model-options",
        nargs="+",
        action=LiteralAction,
        default={},
        metavar="KEY=VALUE",
        help="arguments of a named model, such as num_classes=10",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a trained model, pictures without labels, and how they are looked at."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a config, timm:NAME, torchvision:NAME, or hf:FOLDER",
    )
    add(
        "checkpoint", metavar="CHECKPOINT", help="its weights; - for those of hf:FOLDER"
    )
    add("pictures", metavar="PICTURES", help="folder of pictures without labels")
    add(
        "--size",
        nargs=2,
        type=int,
        action="append",
        metavar=("H", "W"),
        help="of the pictures; may be given several times (224 224)",
    )
    add("--batch-size", type=int, default=4, metavar="N", help="pictures a step (4)")
    add(
        "--attention",
        nargs="+",
        action=LiteralAction,
        default={},
        metavar="KEY=VALUE",
        help="options of the attention, as castle() takes them",
    )
    add("--seed", type=int, default=0, help="of everything random (0)")


def model_from_arguments(args: argparse.Namespace) -> tuple[Any, str | None]:
    """The model, a name or a loaded config, and the checkpoint or None."""
    checkpoint = None if args.checkpoint == "-" else args.checkpoint
    if is_model_name(args.model):
        return args.model, checkpoint
    from mmcastling.run.config import load_config

    return load_config(args.model), checkpoint


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
        choices=(*PRECISIONS, AUTO),
        help="what the layers of the deployed model compute in; auto measures which is "
        f"the fastest on this machine, and remembers it ({default})",
    )


def config_from_arguments(args: argparse.Namespace) -> Any:
    """Load the config that the arguments name, with their options."""
    from mmcastling.run.config import load_config

    cfg = load_config(args.config, args.cfg_options, getattr(args, "work_dir", None))
    if hasattr(args, "launcher"):
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
        cfg.launcher = args.launcher
    return cfg
