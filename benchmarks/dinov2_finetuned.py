"""DINOv2-S finetuned alike as softmax, castled and aligned, and castled alone.

python tools/data/fetch_dinov2_s.py data/dinov2_s
python benchmarks/align_dinov2.py data/dinov2_s PICTURES --rows all
python benchmarks/dinov2_finetuned.py camvid data/dinov2_s        # hours; resumable
python benchmarks/dinov2_finetuned.py dsb2018 data/dinov2_s
python benchmarks/dinov2_finetuned.py --times                     # a minute
python benchmarks/dinov2_finetuned.py --docs                      # the page's table

All rows of a task are one config, seed by seed with the same data; they differ in the
attention and in the weights that they start from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from align_dinov2 import PAGE, TIMES, imported_weights, store_times, times_text
from common import ROOT
from marked import mean_and_each, replace_between
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmcastling.analysis.machine import environment
from mmcastling.castle import RECOMMENDED
from mmcastling.checkpoint import (
    load_checkpoint,
    save_atomically,
    write_json_atomically,
    write_text_atomically,
)
from mmcastling.run import ConfigError, evaluate, load_config, run_cli, train
from mmcastling.run.training import enable_amp

STORED = ROOT / "benchmarks" / "results" / "dinov2_finetuned"
BEGIN, END = "<!-- finetuned-table -->\n", "<!-- /finetuned-table -->"


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained and how it is measured.

    Args:
        config: Name of the config.
        data: Where its data are.
        metrics: Each metric with its heading and digits. The first is the one whose
            validations are shown.
        other: A heading and the options of the config for a second test.
    """

    config: str
    data: str
    metrics: dict[str, tuple[str, int]]
    other: tuple[str, dict[str, Any]]


TASKS = {
    "camvid": Task(
        "upernet_castling_dinov2_s_camvid.py",
        "data/camvid",
        {"mIoU": ("mIoU", 1)},
        ("of whole frames", {"model.test_cfg": dict(mode="whole")}),
    ),
    "dsb2018": Task(
        "mask_rcnn_castling_dinov2_s_dsb2018.py",
        "data/dsb2018",
        {
            # AP counts 100 objects of a micrograph alone, which a tenth exceeds.
            "coco/segm_mAP_50": ("mask AP50", 3),
            "coco/segm_mAP": ("mask AP", 3),
            "coco/segm_mAP_75": ("mask AP75", 3),
            "coco/bbox_mAP_50": ("box AP50", 3),
        },
        (
            "of pictures enlarged 1.5 times",
            {"test_dataloader.dataset.pipeline.1.scale": (1512, 756)},
        ),
    ),
}
# Of a whole picture, and twice that.
SIZES = {
    "camvid": ((504, 672), (1008, 1344)),
    "dsb2018": ((504, 504), (1008, 1008)),
}
ROWS = {
    "softmax": "softmax",
    "aligned": "castled and aligned",
    "castled": "castled, not aligned",
}


def start_weights(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """The backbone's weights that a row starts from."""
    if row != "aligned":
        return imported_weights(args.weights)
    path = args.aligned
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: python benchmarks/align_dinov2.py {args.weights} "
            "PICTURES --rows all writes it, or name another with --aligned"
        )
    saved = load_checkpoint(path)
    steps = saved["settings"]["steps"]
    last = 1 if steps[1] else 0
    if (saved["stage"], saved["step"]) != (last, steps[last]):
        raise ConfigError(
            f"{path} is of an alignment that has not ended: call align_dinov2.py "
            "again, which goes on with it"
        )
    return saved["state_dict"]


def config_of(
    task: str, row: str, seed: int, work_dir: Path, data: str, amp: bool, **more: Any
) -> Config:
    """The config of a run, with ``more`` options."""
    options = {"data_root": data, "randomness.seed": seed, **more}
    cfg = load_config(ROOT / "configs" / TASKS[task].config, options, str(work_dir))
    if row == "softmax":
        cfg.model.backbone.attention = dict(type="softmax")
    if amp:
        enable_amp(cfg, "bfloat16")
    return cfg


def carry_out(task: str, row: str, seed: int, args: argparse.Namespace) -> Any:
    """Train, or go on, and test."""
    work_dir = args.work_dir / f"{task}-{row}-{seed}"
    data = args.data_root or TASKS[task].data
    cfg = config_of(task, row, seed, work_dir, data, args.amp)
    start, last = work_dir / "start.pth", work_dir / "last_checkpoint"
    if not last.is_file():  # else this run goes on
        work_dir.mkdir(parents=True, exist_ok=True)
        state = {f"backbone.{k}": v for k, v in start_weights(row, args).items()}
        save_atomically(dict(state_dict=state), start)
    cfg.load_from = str(start)
    train(cfg, resume="auto")
    found = []
    for options in ({}, TASKS[task].other[1]):
        cfg = config_of(task, row, seed, work_dir, data, args.amp, **options)
        found.append(evaluate(cfg, last.read_text().strip()).metrics)
    attention = cfg.model.backbone.attention.to_dict()
    return dict(
        metrics=found[0],
        other=found[1],
        curve=validations(work_dir, next(iter(TASKS[task].metrics))),
        iterations=cfg.max_iters,
        amp=args.amp,
        attention=attention,
        environment=environment("cpu"),
    )


def validations(work_dir: Path, metric: str) -> list[tuple[int, float]]:
    """The metric at each validation of all sittings, by iteration, or in order where
    the toolbox notes none."""
    found = {}
    for log in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for line in map(json.loads, log.read_text().splitlines()):
            if metric in line:
                found[line["step"] or len(found) + 1] = line[metric]
    return sorted(found.items())


def cells_of(task: Task, row: str, runs: list[dict[str, Any]]) -> list[str]:
    """A line of the table."""
    title = ROWS[row]
    form = runs[0].get("attention", {}).get("form", "learned")
    if row != "softmax" and form != RECOMMENDED["form"]:
        title += f', `form="{form}"`'
    cells = [
        mean_and_each([run["metrics"][metric] for run in runs], digits)
        for metric, (_, digits) in task.metrics.items()
    ]
    metric, (_, digits) = next(iter(task.metrics.items()))
    others = [run["other"][metric] for run in runs if "other" in run]
    cells.insert(1, mean_and_each(others, digits) if others else "")
    curve = " ".join(f"{value:.{digits}f}" for _, value in runs[0]["curve"])
    return [title, *cells, curve]


def table() -> str:
    """The page's part that is generated, in Markdown."""
    lines = []
    for name, task in TASKS.items():
        runs = {
            row: [
                json.loads(p.read_text())
                for p in sorted(STORED.glob(f"{name}-{row}-*"))
            ]
            for row in ROWS
        }
        if not any(runs.values()):
            lines += [f"No run of `configs/{task.config}` is stored yet.", ""]
            continue
        heads = [f"{title} (by seed)" for title, _ in task.metrics.values()]
        heads.insert(1, task.other[0])
        heads.append("validations, first seed")
        lines += [
            f"| `configs/{task.config}` | {' | '.join(heads)} |",
            "| --- | " + "--- | " * len(heads),
        ]
        for row, found in runs.items():
            if found:
                lines.append(f"| {' | '.join(cells_of(task, row, found))} |")
        path = STORED / f"{name}-{TIMES}.json"
        if path.is_file():
            text = times_text(path)
            lines += ["", f"Milliseconds of a picture, softmax and castled: {text}."]
        lines.append("")
    return "\n".join(lines)


def measure_times(task: str, args: argparse.Namespace) -> None:
    """Time the network with softmax and castled; the weights do not matter."""
    models = []
    for row in ("softmax", "castled"):
        cfg = config_of(task, row, 0, args.work_dir, TASKS[task].data, False)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            models.append(MODELS.build(cfg.model))
    store_times(STORED / f"{task}-{TIMES}.json", *models, SIZES[task])


def write_page() -> None:
    """Put the table of stored runs into the page."""
    page = replace_between(PAGE.read_text(), BEGIN, END, table())
    write_text_atomically(PAGE, page)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", nargs="?", choices=list(TASKS))
    add("weights", type=Path, nargs="?", help="folder of fetch_dinov2_s.py")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--data-root", help="(the config's)")
    add("--work-dir", type=Path, default=Path("work_dirs/dinov2_finetuned"))
    add(
        "--aligned",
        type=Path,
        default=Path("work_dirs/align_dinov2/all/align.pth"),
        help="of an alignment (work_dirs/align_dinov2/all/align.pth)",
    )
    add("--amp", action="store_true", help="train in bfloat16")
    add("--times", action="store_true", help="only time both, with nothing beside")
    add("--docs", action="store_true", help="only write the page's table")
    args = parser.parse_args()
    if not (args.docs or args.times) and args.weights is None:
        parser.error("give TASK and WEIGHTS, or --times, or --docs")
    return args


def main() -> None:
    args = parse_args()
    if args.docs:
        write_page()
        return
    STORED.mkdir(parents=True, exist_ok=True)
    if args.times:
        for task in TASKS:
            measure_times(task, args)
        return
    for seed in args.seeds:
        for row in args.rows:
            path = STORED / f"{args.task}-{row}-{seed}.json"
            if path.is_file():
                print(f"{path.stem}: stored already")
                continue
            result = carry_out(args.task, row, seed, args)
            write_json_atomically(path, result)
            print(path.stem, json.dumps(result["metrics"]))


if __name__ == "__main__":
    run_cli(main)
