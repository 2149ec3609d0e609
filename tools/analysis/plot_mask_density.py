"""Plot mask density, threshold and metric over training, from a work directory.

Works on any run with MaskDecayHook, of any toolbox, resumed or not.

Example:
    python tools/analysis/plot_mask_density.py work_dirs/mask_rcnn_castling_nano_nuclei
"""

import argparse
from pathlib import Path

from mmcastling.files import check_writable
from mmcastling.run import run_cli
from mmcastling.show.figures import plot_mask_density
from mmcastling.show.run_log import read_mask_history


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work_dir", type=Path, help="work directory of a training run")
    parser.add_argument(
        "--metric",
        nargs="+",
        metavar="NAME",
        help="metrics to draw, as the log names them (the usual ones of the toolbox)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="picture to write (WORK_DIR/mask_density.png)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out or args.work_dir / "mask_density.png"
    if args.out:
        check_writable(out, ".png", ".PNG")
    history = read_mask_history(args.work_dir)
    plot_mask_density(history, out, args.metric)
    print(
        f"{len(history.steps)} records of masks, iterations {history.steps[0]} to "
        f"{history.steps[-1]}: density {history.density[0]:.4g} -> "
        f"{history.density[-1]:.4g}"
    )
    for name in args.metric or history.headlines():
        step, value = history.metrics[name][-1]
        print(f"{name} {value:.4g} at iteration {step}")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_cli(main)
