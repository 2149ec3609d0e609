"""Paint what a model finds in pictures or a video, and time it.

python tools/demo.py street.jpg configs/mask_rcnn_castling_s_coco.py weights.pth
python tools/demo.py pictures/ detector.onnx --out-dir painted
"""

import argparse

from mmcastling.data import DatasetError
from mmcastling.run import ConfigError, run_cli
from mmcastling.run.demo import build_predictor, find_sources, run_demo


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a picture, a folder of pictures, or a video")
    parser.add_argument(
        "model",
        nargs="+",
        help="CONFIG CHECKPOINT, the config by its path or by our name for it; or one "
        "file that tools/export.py wrote",
    )
    parser.add_argument(
        "--out-dir",
        default="work_dirs/demo",
        help="folder for what is painted (work_dirs/demo)",
    )
    parser.add_argument(
        "--score-thr",
        type=float,
        default=0.3,
        help="detections with lower scores are not drawn (0.3)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (a GPU where there is one)")
    parser.add_argument(
        "--runtime",
        choices=["torch", "onnxruntime", "openvino"],
        help="what runs an exported file (its own)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if not 0 <= args.score_thr <= 1:
        raise ConfigError(f"--score-thr {args.score_thr} must lie between 0 and 1")
    find_sources(args.source)  # before a model is built for nothing
    predictor = build_predictor(args.model, args.device, args.runtime)
    print(f"predicting by {predictor.name}", flush=True)
    report = run_demo(args.source, predictor, args.out_dir, args.score_thr)
    print(f"{report}\nwrote {args.out_dir}: {len(report.written)} files")
    if report.damaged:
        raise DatasetError("; ".join(report.damaged))


if __name__ == "__main__":
    run_cli(main)
