"""Arguments of the commands that take a trained model and pictures without labels."""

from __future__ import annotations

import argparse

from mmengine.config import Config

from mmcastling.named_models import is_model_name
from mmcastling.run.arguments import KeyValueAction
from mmcastling.run.config import load_config


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add model, checkpoint, pictures, and how they are looked at."""
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
        action=KeyValueAction,
        default={},
        metavar="KEY=VALUE",
        help="options of castle() beside the recommended ones",
    )
    add("--seed", type=int, default=0, help="of everything random (0)")


def model_from_arguments(args: argparse.Namespace) -> tuple[str | Config, str | None]:
    """The model, a name or a loaded config, and the checkpoint or None."""
    checkpoint = None if args.checkpoint == "-" else args.checkpoint
    if is_model_name(args.model):
        return args.model, checkpoint
    return load_config(args.model), checkpoint
