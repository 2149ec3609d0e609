"""Show where a point of an image attends to: softmax, angular, masked and combined.

The image takes the config's test pipeline. The four maps over it are the weights of the
token under the point on all tokens, in one attention of the backbone:

  softmax         the row of softmax(q k^T / sqrt(d))
  angular         what is deployed, 1/2 [itself] + (1/pi) cos(q, k); may be negative
  masked softmax  what the auxiliary branch adds: softmax where it exceeds the threshold
  combined        masked + angular

Example:
    python tools/analysis/show_attention.py street.jpg CONFIG.py CHECKPOINT.pth \\
        --point 210 118 --layer 3 --threshold 4/N --out attention.png
"""

import argparse
from pathlib import Path

from mmcastling.files import check_writable
from mmcastling.run import run_cli
from mmcastling.run.arguments import (
    add_config_arguments,
    config_from_arguments,
)
from mmcastling.run.pipelines import FilePipeline
from mmcastling.run.show_attention import (
    click_point,
    draw_attention,
    view_attention,
)


def head(text: str) -> int | None:
    """``--head``: a number, or ``mean`` for None."""
    return None if text == "mean" else int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", help="image file")
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="training or deployed checkpoint")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--point",
        nargs=2,
        type=float,
        metavar=("X", "Y"),
        help="the point, in pixels of the image file from its upper left corner",
    )
    where.add_argument(
        "--click", action="store_true", help="choose the point in a window"
    )
    parser.add_argument(
        "--layer",
        type=int,
        default=-1,
        help="which castling attention, by depth from 0, negative from the end (-1)",
    )
    parser.add_argument(
        "--head", type=head, help="which head, or mean for the mean over heads (mean)"
    )
    parser.add_argument(
        "--threshold",
        help="show what this threshold would keep, a probability or a multiple of "
        "uniform attention such as 4/N (the state that the checkpoint was saved in)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("attention.png"),
        metavar="FILE.png",
        help="picture to write (attention.png)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_writable(args.out, ".png", ".PNG")
    cfg = config_from_arguments(args)
    image = FilePipeline(cfg).read(args.image)
    point = click_point(image) if args.click else tuple(args.point)
    view = view_attention(
        cfg,
        args.checkpoint,
        image,
        point,
        layer=args.layer,
        head=args.head,
        threshold=args.threshold,
    )
    draw_attention(view, args.out)
    grid = view.call.grid
    print(
        f"{view.call.name}: point {point[0]:g} {point[1]:g} is token {view.query} of "
        f"{len(view.rows.softmax)}, on a grid of {grid[0]}x{grid[1]}"
    )
    if not view.survivors:
        print(
            "the masked map is empty: "
            + (
                "the branch was pruned"
                if view.call.mixer.deploy
                else "no pair survives"
            )
            + f" (threshold {view.threshold}, weight {view.weight:g}); q and k still "
            "tell what a mask would keep: --threshold 4/N"
        )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
