"""Export a model to a file that a stock runtime runs, and check it against torch.

A config's model is run on a real image at two sizes; a model of timm, torchvision or
transformers (timm:NAME, torchvision:NAME, hf:FOLDER) at several sizes and batches. The
file is kept only if what it computes agrees with torch.
"""

import argparse
from pathlib import Path

import torch

import mmcastling
from mmcastling.errors import OptionError
from mmcastling.export import DEFAULT_OPSET, FORMAT_PRECISIONS, FORMATS
from mmcastling.named_models import build_named_model, image_shape, is_model_name
from mmcastling.run import run_cli
from mmcastling.run.arguments import (
    add_config_arguments,
    add_named_arguments,
    config_from_arguments,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser, "config, timm:NAME, torchvision:NAME or hf:FOLDER")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="training or deployed checkpoint; may be left out of a named model",
    )
    parser.add_argument(
        "out", nargs="?", help="file to write (the checkpoint's name, another ending)"
    )
    add_named_arguments(parser)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of a named model's example (its own size)",
    )
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help=f"one of {', '.join(FORMATS)} (onnx, or as OUT ends)",
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
        + "; auto: the fastest of them on this machine (fp32)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if is_model_name(args.config):
        print(export_named(args))
        return
    if args.checkpoint is None:
        raise OptionError("a config's model needs its checkpoint: CONFIG CHECKPOINT")
    from mmcastling.run.exporting import export

    export(
        config_from_arguments(args),
        args.checkpoint,
        args.out,
        format=args.format or "onnx",
        part=args.part,
        opset=args.opset,
        image=args.image,
        force=args.force,
        ema=args.ema,
        precision=args.precision,
    )


def export_named(args: argparse.Namespace) -> mmcastling.export.ExportReport:
    """Export a model of a library by its name."""
    for name, usual in dict(image=None, ema=None, part="model").items():
        if getattr(args, name) != usual:
            raise OptionError(f"--{name} is for configs, not for {args.config}")
    checkpoint, out = args.checkpoint, args.out
    if out is None and checkpoint and Path(checkpoint).suffix in FORMATS.values():
        checkpoint, out = None, checkpoint  # NAME OUT
    if out is None:
        if checkpoint is None:
            raise OptionError(f"name the file to write: {args.config} OUT")
        out = Path(checkpoint).with_suffix(FORMATS[args.format or "onnx"])
    if args.format and Path(out).suffix != FORMATS.get(args.format):
        raise OptionError(f"OUT {out} is no file of --format {args.format}")
    model = build_named_model(
        args.config, checkpoint, castle=args.castle, **args.model_options
    )
    example = torch.randn(1, *image_shape(model, args.size))
    options = dict(opset=args.opset, force=args.force, precision=args.precision)
    return mmcastling.export(model, out, example, **options)


if __name__ == "__main__":
    run_cli(main)
