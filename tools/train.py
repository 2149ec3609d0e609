"""Train a model from a config of any OpenMMLab toolbox."""

import argparse

from mmcastling.run import run_cli, train
from mmcastling.run.cli import (
    add_config_arguments,
    add_run_arguments,
    config_from_arguments,
)
from mmcastling.run.hardware import enable_amp, enable_auto_scale_lr
from mmcastling.run.resume import set_resume


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH",
        help="resume from a checkpoint, or without PATH from the newest whole one in "
        "the work directory",
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const=True,
        choices=["float16", "bfloat16"],
        help="automatic mixed precision, without a name in the device's usual one "
        "(float16 on CUDA, bfloat16 on a CPU); put it after CONFIG",
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
    if args.amp is not None:
        enable_amp(cfg, None if args.amp is True else args.amp)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    train(cfg)


if __name__ == "__main__":
    run_cli(main)
