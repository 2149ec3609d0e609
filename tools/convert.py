"""Convert a training checkpoint for deployment: prune, verify, write plain tensors."""

import argparse

from mmcastling.run import convert, run_cli
from mmcastling.run.arguments import (
    add_config_arguments,
    add_precision_argument,
    config_from_arguments,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="training checkpoint")
    parser.add_argument("out", metavar="OUT.pth", help="its config goes beside it")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="measure the largest difference on real test images (if they are there)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="write although the masks have not decayed",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="demand averaged weights, or take the raw ones (what state_dict holds, "
        "which is the averaged ones after EMAHook)",
    )
    add_precision_argument(parser, "fp32")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    convert(
        config_from_arguments(args),
        args.checkpoint,
        args.out,
        verify=args.verify,
        force=args.force,
        ema=args.ema,
        precision=args.precision or "fp32",
    )


if __name__ == "__main__":
    run_cli(main)
