"""Train a model from a config of any OpenMMLab toolbox."""

import argparse

from mmcastling.engine import run_cli, train
from mmcastling.engine.cli import (
    add_config_arguments,
    add_run_arguments,
    config_from_arguments,
)
from mmcastling.engine.training import enable_amp, enable_auto_scale_lr, set_resume


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="resume from a checkpoint, or without PATH from the latest one in the "
        "work directory",
    )
    parser.add_argument(
        "--amp", action="store_true", help="automatic mixed precision (needs CUDA)"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate to the batch size by the linear rule",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = config_from_arguments(args)
    set_resume(cfg, args.resume)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    train(cfg)


if __name__ == "__main__":
    run_cli(main)
