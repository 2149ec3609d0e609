"""Castle a trained model, and teach it from pictures without labels what it knew.

Examples:
    python tools/align.py hf:data/dinov2_s - photos/ work_dirs/dinov2_s
    python tools/align.py timm:vit_small_patch16_224 vit_s.pth photos/ work_dirs/vit_s
    python tools/align.py mask_rcnn.py mask_rcnn.pth photos/ work_dirs/castled
"""

import argparse
import logging

from mmcastling.run import run_cli
from mmcastling.run.align_model import align_model
from mmcastling.run.arguments import add_model_arguments, model_from_arguments


def budget(text: str) -> int | float:
    """A number of attentions, or with a point in it a share."""
    return float(text) if "." in text else int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write; goes on with what is in it")
    two = dict(nargs=2, metavar="N")
    add(
        "--steps",
        **two,
        type=int,
        default=(300, 0),
        help="of the two stages: attentions, then features (300 0)",
    )
    add(
        "--lr",
        **two,
        type=float,
        default=(3e-4, 4e-5),
        help="peaks of the two stages (3e-4 4e-5)",
    )
    add(
        "--keep",
        nargs="+",
        default=[],
        metavar="WHICH",
        help="attentions that stay softmax: indices, names, or auto",
    )
    add(
        "--budget",
        default=2,
        type=budget,
        help="with --keep auto: how many, or the share of the saved time that must "
        "remain, as 0.8 (2)",
    )
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="compute layers in bfloat16 (where this machine multiplies it faster)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mmcastling").setLevel(logging.INFO)
    keep = [int(k) if k.lstrip("-").isdigit() else k for k in args.keep]
    report = align_model(
        *model_from_arguments(args),
        args.pictures,
        args.out,
        sizes=[tuple(size) for size in args.size or [(224, 224)]],
        steps=tuple(args.steps),
        learning_rates=tuple(args.lr),
        batch_size=args.batch_size,
        attention=args.attention,
        keep="auto" if keep == ["auto"] else keep,
        budget=args.budget,
        seed=args.seed,
        amp=args.amp,
    )
    print(report)
    print(f"wrote {args.out}: aligned.pth, report.json, errors.png")


if __name__ == "__main__":
    run_cli(main)
