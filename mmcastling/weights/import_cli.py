"""The options that the commands in ``tools/model_converters/`` share."""

from __future__ import annotations

import argparse

from mmcastling.weights.family import Family
from mmcastling.weights.importing import FAMILIES, import_checkpoint


def run_importer(family: str, description: str) -> None:
    """Import one checkpoint as the command line says, and print the report."""
    options = vars(make_parser(FAMILIES[family], description).parse_args())
    source, destination = options.pop("source"), options.pop("destination")
    size = options.pop("img_size")  # one number or two
    size = size[0] if size and len(size) == 1 else size
    report = import_checkpoint(source, destination, family, img_size=size, **options)
    print(report)
    print(f"wrote {destination}; in a config:")
    given = ", ".join(f"{key}={value!r}" for key, value in report.backbone.items())
    print(
        f"    backbone=dict({given}, init_cfg=dict(type='Pretrained', "
        f"checkpoint={destination!r}, prefix='backbone.'))"
    )


def make_parser(family: Family, description: str) -> argparse.ArgumentParser:
    """The parser of the command that imports a family."""
    libraries = ", ".join(library.name for library in family.libraries)
    archs = ", ".join(family.backbone.arch_zoo)
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("source", metavar="SRC", help=f"weights of {libraries}; .safetensors too")
    add("destination", metavar="DST.pth", help="file to write")
    add("--arch", required=True, help=f"one of {archs}")
    size_help = "one number or H W: resize tables of positions for it (the source's)"
    add("--img-size", type=int, nargs="+", metavar="N", help=size_help)
    add("--in-channels", type=int, default=3, metavar="N", help="of the image (3)")
    attention_help = "of the backbone (castling); softmax is the published network"
    add("--attention", default="castling", metavar="TYPE", help=attention_help)
    add("--prefix", help="of the network's names, where the file holds several")
    if family is FAMILIES["levit"]:
        noise_help = (
            "relative noise on queries and keys that are repeated to the width of "
            "castled heads, so that copies can part in training (0.01)"
        )
        add("--noise", type=float, default=0.01, metavar="STD", help=noise_help)
    if family is FAMILIES["vit"]:
        token_help = "keep DeiT's distillation token (dropped with its position)"
        add("--dist-token", action="store_true", help=token_help)
    partial_help = "let names pass that are unknown or missing"
    add("--allow-partial", action="store_true", help=partial_help)
    return parser
