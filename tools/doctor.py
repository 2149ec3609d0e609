"""Say whether castling a model pays on this machine, before anything is trained.

MODEL is a config, timm:NAME, torchvision:NAME or hf:FOLDER. Measured are milliseconds
and peak memory of one image before castling and after, deployed, at several sizes, and
the share of the attentions in MACs and time; said is what castling would drop, from
which size on it is faster, and in one sentence whether it pays.

Example:
    python tools/doctor.py timm:vit_small_patch14_dinov2 --size 800 1344
"""

import argparse
from pathlib import Path

from torch import nn

import mmcastling
from mmcastling.checkpoint import load_checkpoint, write_json_atomically
from mmcastling.errors import OptionError
from mmcastling.files import check_writable
from mmcastling.named_models import build_named_model, is_model_name
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
        "checkpoint", nargs="?", help="of the original (times do not depend on it)"
    )
    add_named_arguments(parser)
    parser.add_argument(
        "--size",
        dest="sizes",
        action="append",
        nargs=2,
        type=int,
        default=[],
        metavar=("H", "W"),
        help="of an image; may be repeated (three usual ones that the model takes)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--out", metavar="PNG", help="draw latency against resolution")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.json is not None:
        check_writable(args.json, option="--json")
    if args.out is not None:
        check_writable(args.out, ".png")
        import mmcastling.show.figures as drawing  # before minutes of work
    found = mmcastling.doctor(
        _build(args),
        [(height, width) for height, width in args.sizes],
        say=lambda line: print(line, flush=True),
        **(args.castle or {}),
    )
    print(f"\n{found}")
    if args.json is not None:
        write_json_atomically(args.json, dict(name=args.config, **found.to_json()))
    if args.out is not None:
        drawing.plot_latency(found, args.out, args.config)
        print(f"drew {args.out}")


def _build(args: argparse.Namespace) -> nn.Module:
    if is_model_name(args.config):
        return build_named_model(args.config, args.checkpoint, **args.model_options)
    if ":" in args.config and not Path(args.config).exists():
        raise OptionError(
            f"{args.config!r} is no config and no model's name: give a config, "
            "timm:NAME, torchvision:NAME or hf:FOLDER"
        )
    cfg = config_from_arguments(args)
    from mmcastling.run.load import build_model, load_model

    if args.checkpoint is None:
        return build_model(cfg)
    return load_model(cfg, load_checkpoint(args.checkpoint), args.checkpoint)


if __name__ == "__main__":
    run_cli(main)
