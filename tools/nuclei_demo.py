"""The whole way on real images: train with decaying masks, prune, evaluate, compare.

Writes everything under the work directory: summary.json, the pictures, the training
checkpoint, and the deployed checkpoint with its config.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from pycocotools.coco import COCO
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mmcastling.analysis import ComplexityReport, count_model_macs, paired_medians
from mmcastling.checkpoint import (
    load_checkpoint,
    write_json_atomically,
)
from mmcastling.run import ConfigError, convert, evaluate, load_config, run_cli
from mmcastling.run.load import load_model
from mmcastling.run.training import CPU_ENVIRONMENT
from mmcastling.show.figures import (
    draw_rows,
    paint_masks,
    plot_mask_density,
    save_figure,
)
from mmcastling.show.run_log import read_mask_history
from mmcastling.verbs import set_mask, switch_to_deploy

TOOLS = Path(__file__).resolve().parent
CONFIG = TOOLS.parent / "configs" / "mask_rcnn_castling_nano_nuclei.py"
METRICS = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")

console = Console()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", default="work_dirs/demo", help="output folder")
    parser.add_argument("--data-root", default="data/nuclei", help="made if missing")
    parser.add_argument("--iters", type=int, help="training iterations (the config's)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    work_dir = Path(args.work_dir)
    console.rule("1. data")
    prepare_data(args.data_root)
    console.rule("2. train while the masks decay")
    options = demo_options(args)
    cfg = load_config(CONFIG, options, work_dir=str(work_dir))
    checkpoint = train(work_dir, options, cfg.train_cfg.max_iters)
    console.rule("3. prune the softmax branch")
    deployed = work_dir / "deployed.pth"
    with quiet(work_dir / "convert.log"):
        report = convert(cfg, checkpoint, deployed, verify=True, num_images=24)
    console.print(str(report), highlight=False)
    console.rule("4. evaluate both graphs")
    summary = compare(cfg, checkpoint, deployed, deployed.with_suffix(".py"))
    summary["max_abs_diff"] = report.difference
    history = read_mask_history(work_dir)
    summary["mask_density"] = history.density
    plot_mask_density(history, work_dir / "mask_density.png")
    draw_predictions(
        deployed.with_suffix(".py"), deployed, work_dir / "predictions.png"
    )
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_json_atomically(work_dir / "summary.json", summary)
    console.rule("result")
    print_table(summary)
    for name in ("summary.json", "mask_density.png", "predictions.png", "deployed.pth"):
        console.print(f"  {work_dir / name}")


def prepare_data(folder: str) -> None:
    """Run ``tools/data/prepare_nuclei.py``, which says itself what went wrong."""
    command = [sys.executable, str(TOOLS / "data" / "prepare_nuclei.py")]
    done = subprocess.run([*command, "--out", folder])
    if done.returncode:
        sys.exit(done.returncode)


def demo_options(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the arguments change, as --cfg-options."""
    options = {"data_root": args.data_root, "randomness.seed": args.seed}
    if args.iters is not None:
        if args.iters < 2:
            raise ConfigError(f"--iters {args.iters}: give at least 2 iterations")
        for key in (
            "train_cfg.max_iters",
            "train_cfg.val_interval",
            "default_hooks.checkpoint.interval",
            "param_scheduler.1.end",
        ):
            options[key] = args.iters
        options["default_hooks.logger.interval"] = max(1, min(20, args.iters // 10))
        options["param_scheduler.0.end"] = min(50, args.iters // 2)
        options["param_scheduler.1.begin"] = min(50, args.iters // 2)
        options["param_scheduler.1.T_max"] = args.iters - min(50, args.iters // 2)
    return options


def train(work_dir: Path, options: dict[str, Any], max_iters: int) -> Path:
    """Run ``tools/train.py`` with a progress bar; returns its last checkpoint.

    Raises:
        RuntimeError: If it fails; shows the end of its output.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / "train.log"
    command = [sys.executable, str(TOOLS / "train.py"), str(CONFIG)]
    command += ["--work-dir", str(work_dir), "--cfg-options"]
    command += [f"{key}={value}" for key, value in options.items()]
    # The masks are set by the hook; validation comes in step 4, for both graphs.
    command += ["val_dataloader=None", "val_cfg=None", "val_evaluator=None"]
    console.print(" ".join(["python", *command[1:]]), highlight=False, soft_wrap=True)
    with (
        log.open("w") as out,
        progress_bar() as bar,
        subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**CPU_ENVIRONMENT, **os.environ},
        ) as process,
    ):
        task = bar.add_task("training", total=max_iters, state="")
        while process.poll() is None:
            time.sleep(0.5)
            bar.update(task, **latest_state(log))
        bar.update(task, **latest_state(log))
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"training failed, its output ends with:\n{tail}\nsee {log}")
    return Path((work_dir / "last_checkpoint").read_text().strip())


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
    )


def latest_state(log: Path) -> dict[str, Any]:
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if "Iter(train)" in line]
    done = re.search(r"Iter\(train\) +\[ *(\d+)/", lines[-1]) if lines else None
    if done is None:
        return {}
    values = dict(re.findall(r"(\w+): ([\d.e+-]+)", lines[-1]))
    return {
        "completed": int(done[1]),
        "state": f"loss {values.get('loss')}  density {values.get('mask_density')}",
    }


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what libraries print to a file."""
    with (
        log.open("a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def compare(
    cfg: Config, checkpoint: Path, deployed: Path, deployed_config: Path
) -> dict[str, Any]:
    """Metrics, cost and time of the training graph and of the deployed one.

    The training graph's metrics are those of its last state, masks at zero; its MACs
    and time are those with the branch on, as at the start of training.
    """
    cfg.log_level = "WARNING"
    log = Path(cfg.work_dir) / "evaluate.log"
    root = cfg.data_root
    deploy_cfg = load_config(deployed_config, {}, work_dir=cfg.work_dir)
    deploy_cfg.log_level = "WARNING"
    with console.status("evaluating the training graph"), quiet(log):
        trained = evaluate(cfg, checkpoint, deploy=False).metrics
    with console.status("evaluating the deployed graph"), quiet(log):
        pruned = evaluate(deploy_cfg, deployed).metrics
    with console.status("counting and timing"), quiet(log):
        model = load_model(cfg, load_checkpoint(checkpoint), checkpoint)
        set_mask(model, "1/N")
        lean = switch_to_deploy(model)
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        batch = model.data_preprocessor(pseudo_collate([dataset[0]]), False)
        shape = tuple(batch["inputs"].shape[-2:])
        costs: dict[str, ComplexityReport] = {
            "train_graph": count_model_macs(model, shape),
            "deploy": count_model_macs(lean, shape),
        }
        with torch.no_grad():
            seconds = paired_medians(
                {
                    "train_graph": lambda: model(**batch, mode="predict"),
                    "deploy": lambda: lean(**batch, mode="predict"),
                },
                repeats=7,
            )
    summary: dict[str, Any] = {"params": costs["deploy"].params, "data_root": root}
    for name, metrics in (("train_graph", trained), ("deploy", pruned)):
        summary[name] = {key: metrics[f"coco/{key}"] for key in METRICS}
        summary[name]["macs"] = costs[name].macs
        summary[name]["seconds_per_image"] = seconds[name]
    summary["image_size"] = shape
    summary["torch"], summary["threads"] = torch.__version__, torch.get_num_threads()
    return summary


def draw_predictions(
    config: Path, checkpoint: Path, path: Path, count: int = 3
) -> None:
    """Draw the tiles with the median, and around it, number of nuclei."""
    with quiet(path.parent / "evaluate.log"):
        cfg = load_config(config, {})
        model = load_model(cfg, load_checkpoint(checkpoint), checkpoint)
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        coco = COCO(cfg.test_evaluator.ann_file)
    picked = np.linspace(0, len(dataset) - 1, count + 2).round().astype(int)[1:-1]
    rows, counts = [], []
    for index in picked:
        item = dataset[int(index)]
        with torch.no_grad():
            result = model.test_step(pseudo_collate([item]))[0].pred_instances
        found = result.masks[result.scores > 0.5].cpu().numpy().astype(bool)
        sample = item["data_samples"]
        image = cv2.imread(sample.img_path)[..., ::-1]
        annotations = coco.loadAnns(coco.getAnnIds(sample.img_id, iscrowd=False))
        truth = [coco.annToMask(annotation).astype(bool) for annotation in annotations]
        rows.append((image, paint_masks(image, truth), paint_masks(image, found)))
        counts += ["", f"{len(truth)} objects", f"{len(found)} objects"]
    figure = draw_rows(rows, ("image", "ground truth", "prediction"))
    for axes, text in zip(figure.axes, counts, strict=True):
        axes.set_xlabel(text)
    save_figure(figure, path, dpi=110)


def print_table(summary: dict[str, Any]) -> None:
    height, width = summary["image_size"]
    table = Table(title=f"Mask R-CNN, Castling-ViT-nano, nuclei ({height}x{width})")
    for name in (
        "graph",
        "bbox AP",
        "AP50",
        "segm AP",
        "AP50",
        "GMACs",
        "params",
        "s/img",
    ):
        table.add_column(name, justify="left" if name == "graph" else "right")
    for name, label in (("train_graph", "training"), ("deploy", "deployed")):
        row = summary[name]
        table.add_row(
            label,
            *(f"{row[key]:.3f}" for key in METRICS),
            f"{row['macs'] / 1e9:.2f}",
            f"{summary['params'] / 1e6:.2f} M",
            f"{row['seconds_per_image']:.3f}",
        )
    console.print(table)
    console.print(
        "AP of the training graph is that of its last state, masks at zero; its MACs "
        "and time are those with the softmax branch on. Largest difference of features "
        "between the last state and the deployed graph: "
        f"{summary['max_abs_diff']:.2g}.\n"
        f"Mask density over training: {summary['mask_density'][0]:.4f} -> "
        f"{summary['mask_density'][-1]:.4f}. {summary['seconds']:.0f} s in all."
    )


if __name__ == "__main__":
    run_cli(main)
