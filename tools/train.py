"""Train a model from a config of any OpenMMLab toolbox."""

import argparse

from mmcastling.run import run_cli, train
from mmcastling.run.arguments import (
    add_config_arguments,
    add_run_arguments,
    config_from_arguments,
)


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
    train(cfg, resume=args.resume, amp=args.amp, auto_scale_lr=args.auto_scale_lr)


if __name__ == "__main__":
    run_cli(main)
