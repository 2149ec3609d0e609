"""Castle each attention of a trained model alone: what that costs and what it saves.

Example:
    python tools/scan.py hf:data/dinov2_s - photos/ --size 448 448 --out scan.png
"""

import argparse
from dataclasses import asdict

from mmcastling.checkpoint import write_json_atomically
from mmcastling.files import check_writable
from mmcastling.run import ConfigError, run_cli
from mmcastling.run.align_model import scan_model, scan_table
from mmcastling.run.arguments import add_model_arguments, model_from_arguments


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--aligned",
        metavar="CHECKPOINT",
        help="what tools/align.py has written: look at its attentions",
    )
    parser.add_argument("--out", metavar="PNG", help="draw the table")
    parser.add_argument("--json", metavar="FILE", help="write the table")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for path, suffix in ((args.out, ".png"), (args.json, ".json")):
        if path:
            check_writable(path, suffix)
    if args.out:
        from mmcastling.show.align_figures import plot_scan
    if len(args.size or []) > 1:
        raise ConfigError("a scan has one --size; call it again for another")
    (size,) = args.size or [(224, 224)]
    rows = scan_model(
        *model_from_arguments(args),
        args.pictures,
        size=tuple(size),
        batch_size=args.batch_size,
        attention=args.attention,
        aligned=args.aligned,
        seed=args.seed,
    )
    print(scan_table(rows))
    if args.json:
        write_json_atomically(args.json, [asdict(row) for row in rows])
        print(f"wrote {args.json}")
    if args.out:
        plot_scan(rows, args.out)
        print(f"drew {args.out}")


if __name__ == "__main__":
    run_cli(main)
