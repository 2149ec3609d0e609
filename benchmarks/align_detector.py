"""The demo's detector: trained with softmax, then castled and aligned without labels.

python tools/data/prepare_nuclei.py
python benchmarks/align_detector.py               # hours; resumable, seed by seed
python benchmarks/align_detector.py --times       # milliseconds, a minute
python benchmarks/align_detector.py --docs        # the page's table

For every seed: train ``configs/mask_rcnn_castling_nano_nuclei.py`` with softmax; castle
its backbone and test it as it is; align it, heads frozen, on the pictures of its
training tiles alone, as ``tools/align.py`` does; test it deployed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

from align_dinov2 import PAGE, TIMES, store_times, times_text
from common import ROOT
from marked import mean_and_each, replace_between
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmcastling import castle
from mmcastling.analysis.machine import environment
from mmcastling.castle import RECOMMENDED
from mmcastling.checkpoint import (
    load_checkpoint,
    save_atomically,
    write_json_atomically,
    write_text_atomically,
)
from mmcastling.deploy import may_gain
from mmcastling.run import ConfigError, evaluate, load_config, run_cli, train
from mmcastling.run.align_model import ALIGNED, CONFIG, align_model
from mmcastling.run.load import load_model

STORED = ROOT / "benchmarks" / "results" / "align_detector"
BEGIN, END = "<!-- detector-table -->\n", "<!-- /detector-table -->"
BASE = ROOT / "configs" / "mask_rcnn_castling_nano_nuclei.py"
METRICS = ("coco/bbox_mAP", "coco/segm_mAP", "coco/segm_mAP_50")
ROWS = {
    "softmax": "softmax (the teacher)",
    "castled": "castled, not aligned",
    "aligned": "castled and aligned",
}
# Training sees 256x256 and testing 512x512 pixels, 1,024 and 4,096 tokens.
SIZES = ((256, 256), (512, 512))
TIMED = ((512, 512), (1024, 1024))
RECIPE = dict(steps=(300, 0), learning_rates=(3e-4, 4e-5), batch_size=4, sizes=SIZES)


def softmax_config(seed: int, args: argparse.Namespace, folder: Path) -> Config:
    """The demo's config with softmax attention."""
    options = {"data_root": args.data_root, "randomness.seed": seed}
    options["train_cfg.val_interval"] = 10**6  # tested below
    cfg = load_config(BASE, options, str(folder / "softmax"))
    cfg.model.backbone.attention = dict(type="softmax")
    cfg.custom_hooks = []
    return cfg


def untrained(cfg: Config, checkpoint: Path, castled: Path) -> None:
    """Write the checkpoint of a castled model that was not aligned."""
    whole = load_model(cfg, load_checkpoint(checkpoint), str(checkpoint))
    whole.backbone = castle(whole.backbone)
    save_atomically(dict(state_dict=whole.state_dict(), meta={}), castled)


def carry_out(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on; castle, align and test."""
    folder = args.work_dir / f"seed{seed}"
    cfg = softmax_config(seed, args, folder)
    last = folder / "softmax" / "last_checkpoint"
    ended = f"iter_{cfg.max_iters}.pth"
    if not last.is_file() or Path(last.read_text().strip()).name != ended:
        train(copy.deepcopy(cfg), resume="auto")
    teacher = Path(last.read_text().strip())
    report = align_model(
        cfg,
        str(teacher),
        Path(args.data_root) / "train",
        folder / "aligned",
        seed=seed,
        **RECIPE,
    )
    castled_config = load_config(
        folder / "aligned" / CONFIG, None, str(folder / "test")
    )
    untrained(cfg, teacher, folder / "castled.pth")
    tested = dict(
        softmax=(cfg, teacher),
        castled=(castled_config, folder / "castled.pth"),
        aligned=(castled_config, folder / "aligned" / ALIGNED),
    )
    metrics = {}
    for row, (config, checkpoint) in tested.items():
        found = evaluate(copy.deepcopy(config), str(checkpoint)).metrics
        metrics[row] = {name: found[name] for name in METRICS}
    recipe = dict(RECIPE, amp=may_gain("bf16"), iterations=cfg.max_iters)
    recipe["attention"] = RECOMMENDED
    return dict(
        recipe=recipe,
        metrics=metrics,
        cosines=dict(before=report.cosines_before, after=report.cosines_after),
        environment=environment("cpu"),
    )


def table() -> str:
    """The page's part that is generated, in Markdown."""
    runs = [json.loads(path.read_text()) for path in sorted(STORED.glob("seed*.json"))]
    if not runs:
        return "No run is stored yet.\n"
    lines = [
        "| Mask R-CNN Castling-nano, nuclei | box AP | mask AP | mask AP50 |",
        "| --- | --- | --- | --- |",
    ]
    for row, title in ROWS.items():
        cells = []
        for metric in METRICS:
            cells.append(mean_and_each([run["metrics"][row][metric] for run in runs]))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    teacher, aligned = (
        [run["metrics"][row]["coco/segm_mAP"] for run in runs]
        for row in ("softmax", "aligned")
    )
    share = statistics.mean(b / a for a, b in zip(teacher, aligned, strict=True))
    text = (
        f"{share:.3f} of the teacher's mask AP remains, the mean of {len(runs)} "
        f"seed{'s' * (len(runs) > 1)} (in brackets each)."
    )
    forms = {run["recipe"].get("attention", {}).get("form", "learned") for run in runs}
    if forms != {RECOMMENDED["form"]}:
        text += f" These were castled with `form=` {', '.join(sorted(forms))}."
    if (STORED / f"{TIMES}.json").is_file():
        text += (
            " Milliseconds of a picture, softmax and castled, with heads and without "
            f"what decodes: {times_text(STORED / f'{TIMES}.json')}."
        )
    return "\n".join([*lines, "", text, ""])


def measure_times(args: argparse.Namespace) -> None:
    """Time the detector with softmax and castled; the weights do not matter."""
    cfg = softmax_config(0, args, args.work_dir)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    castled = copy.deepcopy(model)
    castled.backbone = castle(castled.backbone)
    store_times(STORED / f"{TIMES}.json", model, castled, TIMED)


def write_page() -> None:
    """Put the table of stored runs into the page."""
    page = replace_between(PAGE.read_text(), BEGIN, END, table())
    write_text_atomically(PAGE, page)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--data-root", default="data/nuclei", help="of prepare_nuclei.py")
    add("--work-dir", type=Path, default=Path("work_dirs/align_detector"))
    add("--times", action="store_true", help="only time it, with nothing beside")
    add("--docs", action="store_true", help="only write the page's table")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.docs:
        write_page()
        return
    if not (Path(args.data_root) / "train").is_dir():
        raise ConfigError(
            f"{args.data_root} has no pictures: python tools/data/prepare_nuclei.py "
            f"--out {args.data_root}"
        )
    STORED.mkdir(parents=True, exist_ok=True)
    if args.times:
        measure_times(args)
        return
    for seed in args.seeds:
        path = STORED / f"seed{seed}.json"
        if path.is_file():
            print(f"{path.stem}: stored already")
            continue
        result = carry_out(seed, args)
        write_json_atomically(path, result)
        print(path.stem, json.dumps(result["metrics"]))


if __name__ == "__main__":
    run_cli(main)
