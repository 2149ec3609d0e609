"""Evaluate a checkpoint, pruned by default, or a file that tools/export.py wrote."""

import argparse

from mmengine.dist import is_main_process

from mmcastling.run import evaluate, run_cli
from mmcastling.run.arguments import (
    add_config_arguments,
    add_precision_argument,
    add_run_arguments,
    config_from_arguments,
)
from mmcastling.run.testing import enable_drawing, enable_output, enable_tta


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "checkpoint", help="training or deployed checkpoint, or an exported file"
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--deploy",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prune the auxiliary softmax branch before evaluating",
    )
    add_precision_argument(parser, "the config's, or fp32")
    parser.add_argument(
        "--runtime",
        choices=["torch", "onnxruntime", "openvino"],
        help="what runs the model (torch for checkpoints, its own for exported files)",
    )
    parser.add_argument("--out", metavar="FILE.pkl", help="write all predictions")
    parser.add_argument("--show", action="store_true", help="show predictions")
    parser.add_argument("--show-dir", metavar="FOLDER", help="write painted images")
    parser.add_argument(
        "--wait-time", type=float, default=2.0, help="seconds per shown image (2)"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = config_from_arguments(args)
    if args.show or args.show_dir is not None:
        enable_drawing(cfg, args.show, args.show_dir, args.wait_time)
    if args.tta:
        enable_tta(cfg)
    if args.out is not None:
        enable_output(cfg, args.out)
    result = evaluate(
        cfg,
        args.checkpoint,
        deploy=args.deploy,
        precision=args.precision,
        runtime=args.runtime,
    )
    if is_main_process():
        print(result)


if __name__ == "__main__":
    run_cli(main)
