"""Export a model to a file that a stock runtime runs, and check it against torch.

The file is run on a real image at two sizes and compared with torch; it is kept only
if they agree.
"""

import argparse

from mmcastling.export import DEFAULT_OPSET, FORMAT_PRECISIONS, FORMATS
from mmcastling.run import run_cli
from mmcastling.run.arguments import add_config_arguments, config_from_arguments
from mmcastling.run.exporting import export


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="training or deployed checkpoint")
    parser.add_argument(
        "out", nargs="?", help="file to write (the checkpoint's name, another ending)"
    )
    parser.add_argument(
        "--format",
        default="onnx",
        metavar="FORMAT",
        help=f"one of {', '.join(FORMATS)} (onnx)",
    )
    parser.add_argument(
        "--part",
        choices=["model", "backbone"],
        default="model",
        help="the whole model, or its backbone alone (model)",
    )
    parser.add_argument(
        "--opset", type=int, default=DEFAULT_OPSET, help=f"of ONNX ({DEFAULT_OPSET})"
    )
    parser.add_argument(
        "--image", metavar="FILE", help="compare on it (the first of the test set)"
    )
    parser.add_argument(
        "--force", action="store_true", help="go on though the masks have not decayed"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="demand averaged weights, or take the raw ones",
    )
    lower = {name: known[1:] for name, known in FORMAT_PRECISIONS.items()}
    parser.add_argument(
        "--precision",
        default="fp32",
        metavar="PRECISION",
        help="what matrix products compute in, below fp32: "
        + "; ".join(f"{name}: {', '.join(known)}" for name, known in lower.items())
        + " (fp32)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    export(
        config_from_arguments(args),
        args.checkpoint,
        args.out,
        format=args.format,
        part=args.part,
        opset=args.opset,
        image=args.image,
        force=args.force,
        ema=args.ema,
        precision=args.precision,
    )


if __name__ == "__main__":
    run_cli(main)
