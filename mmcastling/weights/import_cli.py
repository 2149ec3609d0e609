"""The options that the commands in ``tools/model_converters/`` share."""

from __future__ import annotations

import argparse

from mmcastling.weights.family import Family
from mmcastling.weights.importing import FAMILIES, import_checkpoint


def run_importer(family: str, description: str) -> None:
    """Import one checkpoint as the command line says, and print the report.

    Args:
        family: A key of :data:`mmcastling.weights.FAMILIES`.
        description: What the command does.
    """
    args = make_parser(FAMILIES[family], description).parse_args()
    size = args.img_size  # one number or two
    report = import_checkpoint(
        args.source,
        args.destination,
        family,
        args.arch,
        img_size=size[0] if size and len(size) == 1 else size,
        in_channels=args.in_channels,
        attention=args.attention,
        prefix=args.prefix,
        noise=getattr(args, "noise", 0.0),
        dist_token=getattr(args, "dist_token", False),
        allow_partial=args.allow_partial,
    )
    print(report)
    print(f"wrote {args.destination}; in a config:")
    options = ", ".join(f"{k}={v!r}" for k, v in report.backbone.items())
    print(
        f"    backbone=dict({options}, init_cfg=dict(type='Pretrained', "
        f"checkpoint={args.destination!r}, prefix='backbone.'))"
    )


def make_parser(family: Family, description: str) -> argparse.ArgumentParser:
    """Make the command's parser.

    Args:
        family: What it imports.
        description: What the command does.
    """
    libraries = ", ".join(dialect.name for dialect in family.dialects)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "source", metavar="SRC", help=f"weights of {libraries}; .safetensors too"
    )
    parser.add_argument("destination", metavar="DST.pth", help="file to write")
    parser.add_argument(
        "--arch", required=True, help=f"one of {', '.join(family.backbone.arch_zoo)}"
    )
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="N",
        help="one number or H W: resize tables of positions for it (the source's)",
    )
    parser.add_argument(
        "--in-channels", type=int, default=3, metavar="N", help="of the image (3)"
    )
    parser.add_argument(
        "--attention",
        default="castling",
        metavar="TYPE",
        help="the backbone's attention (castling); softmax is the published network",
    )
    parser.add_argument(
        "--prefix", help="of the network's names, where the file holds several networks"
    )
    if family.name == "LeViT":
        parser.add_argument(
            "--noise",
            type=float,
            default=0.01,
            metavar="STD",
            help="relative noise on queries and keys that are repeated to the width of "
            "castled heads, so that copies can part in training (0.01)",
        )
    if family.name == "ViT":
        parser.add_argument(
            "--dist-token",
            action="store_true",
            help="keep DeiT's distillation token (dropped with its position)",
        )
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help="let names pass that are unknown or missing",
    )
    return parser
