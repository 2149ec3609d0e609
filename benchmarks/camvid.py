"""Segmentation of real road scenes: train, prune, evaluate, compare with two baselines.

Trains ``configs/upernet_castling_nano_camvid.py`` from scratch with ``tools/train.py``,
prunes it and evaluates it on the validation frames. The baselines say what the figures
are worth: the class that most training pixels have, everywhere; and a classifier that
sees the colour of a pixel and nothing else, neither its place nor its neighbours.

python benchmarks/camvid.py            # about 15 minutes; stores figures and a picture
python benchmarks/camvid.py --docs     # write the page from the stored figures

Needs CamVid's frames in ``data/camvid`` (``images/`` and ``annotations/``, each with
``train/`` and ``val/``), with the class ids of SegNet's release: 0 to 10, 11 for void.
A finished training in the work directory is used again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mmengine
import mmseg
import numpy as np
import torch
from marked import replace_between
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from PIL import Image
from segmentation_figure import SegmentationLegend, plot_segmentation
from torch import Tensor, nn

from mmcastling.analysis import count_model_macs
from mmcastling.analysis.machine import environment
from mmcastling.checkpoint import (
    load_checkpoint,
    write_json_atomically,
    write_text_atomically,
)
from mmcastling.run import evaluate, load_config, run_cli
from mmcastling.run.load import load_pruned_model
from mmcastling.run.training import CPU_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "upernet_castling_nano_camvid.py"
STORED = ROOT / "benchmarks" / "results" / "camvid.json"
PICTURE = ROOT / "docs" / "assets" / "camvid.png"
PAGE = ROOT / "docs" / "segmentation.md"
BEGIN, END = "<!-- camvid -->\n", "<!-- /camvid -->"

PIXELS = 400_000
"""Training pixels that the colour classifier sees, drawn at random."""
STEPS = 2_000
"""Batches of 4,096 of them that it is trained with."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", default="data/camvid", help="(data/camvid)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/camvid"))
    parser.add_argument("--config", type=Path, default=CONFIG, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=STORED, help="result to write")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG to write")
    parser.add_argument("--docs", action="store_true", help="only write the page")
    return parser.parse_args()


# -- the network -----------------------------------------------------------------------


def train(config: Path, data_root: str, work_dir: Path) -> tuple[Path, dict[str, Any]]:
    """Train in a process of its own, or find that it has been done.

    Returns:
        The last checkpoint, and of the training its ``seconds``, its ``cpu_seconds`` in
        all processes (the same where nothing else runs), and its ``threads``.

    Raises:
        RuntimeError: If training fails; shows the end of its output.
    """
    record = work_dir / "training.json"
    text = Config.fromfile(config).pretty_text
    if record.is_file():
        facts = json.loads(record.read_text())
        if facts.pop("config") == text:
            return Path((work_dir / "last_checkpoint").read_text().strip()), facts
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / "train.log"
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(config)]
    command += ["--work-dir", str(work_dir), "--cfg-options", f"data_root={data_root}"]
    started, cpu = time.perf_counter(), _children_seconds()
    with log.open("w") as out:
        done = subprocess.run(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**CPU_ENVIRONMENT, **os.environ},
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"training failed, its output ends with:\n{tail}\nsee {log}")
    facts = dict(
        seconds=round(time.perf_counter() - started, 1),
        cpu_seconds=round(_children_seconds() - cpu, 1),
        threads=torch.get_num_threads(),
    )
    write_json_atomically(record, dict(facts, config=text))
    return Path((work_dir / "last_checkpoint").read_text().strip()), facts


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def deployed_model(cfg: Config, checkpoint: Path) -> nn.Module:
    """The pruned segmentor, in evaluation mode."""
    loaded = load_checkpoint(checkpoint)
    return load_pruned_model(cfg, loaded, checkpoint, verify=False)[0]


@torch.no_grad()
def predictions(model: nn.Module, cfg: Config) -> list[np.ndarray]:
    """Predicted class ids ``(H, W)`` of all test images, in the dataset's order."""
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    found = []
    for index in range(len(dataset)):
        (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        found.append(sample.pred_sem_seg.data[0].cpu().numpy())
    return found


# -- data and baselines ----------------------------------------------------------------


def frames(cfg: Config, split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """RGB images ``(H, W, 3)`` and their label maps ``(H, W)``, in order."""
    dataset = DATASETS.build(dict(cfg[f"{split}_dataloader"].dataset, pipeline=[]))
    pairs = (dataset.get_data_info(index) for index in range(len(dataset)))
    return [
        (
            np.asarray(Image.open(pair["img_path"]).convert("RGB")),
            np.asarray(Image.open(pair["seg_map_path"])),
        )
        for pair in pairs
    ]


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true class (rows) and predicted class; what is no class is left out."""
    kept = truth < classes
    index = truth[kept].astype(np.int64) * classes + predicted[kept]
    counts = np.bincount(index, minlength=classes**2)
    return counts.reshape(classes, classes)


def scores(matrix: np.ndarray, classes: list[str]) -> dict[str, Any]:
    """Pixel accuracy, mean IoU and IoU by class, in percent.

    A class that is nowhere, in truth or prediction, has no IoU.
    """
    hit = np.diag(matrix)
    union = matrix.sum(0) + matrix.sum(1) - hit
    iou = {
        name: 100.0 * float(hit[i]) / float(union[i])
        for i, name in enumerate(classes)
        if union[i]
    }
    return dict(
        accuracy=100.0 * float(hit.sum()) / float(matrix.sum()),
        miou=float(np.mean(list(iou.values()))),
        iou=iou,
    )


def colour_classifier(
    train: list[tuple[np.ndarray, np.ndarray]],
    classes: int,
    weight: list[float] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A classifier of single colours: three layers, 64 wide, on RGB in [0, 1].

    Args:
        train: Images and label maps.
        classes: Number of classes.
        weight: Of each class in the loss. Defaults to None (all alike).
        seed: Of the pixels that are drawn, the initial weights and the batches.
    """
    rng = np.random.default_rng(seed)
    colours = np.concatenate([image.reshape(-1, 3) for image, _ in train])
    labels = np.concatenate([label.reshape(-1) for _, label in train])
    usable = np.flatnonzero(labels < classes)
    drawn = rng.choice(usable, min(PIXELS, len(usable)), replace=False)
    x = torch.from_numpy(colours[drawn]).float() / 255
    y = torch.from_numpy(labels[drawn].astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()),
            nn.Linear(64, classes),
        )
    loss = nn.CrossEntropyLoss(None if weight is None else torch.tensor(weight))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (4096,), generator=generator)
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def classify_colours(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """Class ids ``(H, W)`` of an RGB image, pixel by pixel."""
    logits: Tensor = model(torch.from_numpy(image.copy()).float() / 255)
    return logits.argmax(-1).numpy()


def baselines(
    train: list[tuple[np.ndarray, np.ndarray]],
    val: list[tuple[np.ndarray, np.ndarray]],
    classes: list[str],
    weight: list[float],
) -> dict[str, Any]:
    """Scores of the baselines on the validation frames, by name."""
    count = len(classes)
    shares = np.zeros(count, np.int64)
    for _, label in train:
        shares += np.bincount(label.reshape(-1), minlength=256)[:count]
    most = int(shares.argmax())
    colour = colour_classifier(train, count)
    weighted = colour_classifier(train, count, weight)
    rules = {
        "constant": lambda image: np.full(image.shape[:2], most),
        "colour": lambda image: classify_colours(colour, image),
        "colour_weighted": lambda image: classify_colours(weighted, image),
    }
    result: dict[str, Any] = {
        name: scores(
            sum(confusion(rule(image), label, count) for image, label in val), classes
        )
        for name, rule in rules.items()
    }
    result["constant"]["class"] = classes[most]
    return result


# -- the result ------------------------------------------------------------------------

ROWS = {
    "network": "UPerNet, Castling-ViT-nano, deployed",
    "constant": "`{constant}` everywhere",
    "colour": "colour of the pixel",
    "colour_weighted": "colour, classes weighted as for the network",
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate; draws the picture."""
    checkpoint, training = train(args.config, args.data_root, args.work_dir)
    options = dict(data_root=args.data_root)
    cfg = load_config(args.config, options, work_dir=str(args.work_dir / "test"))
    meta = cfg.test_dataloader.dataset.metainfo
    classes = list(meta.classes)
    reported = evaluate(cfg, checkpoint)

    model = deployed_model(cfg, checkpoint)
    val, found = frames(cfg, "val"), predictions(model, cfg)
    matrix = sum(
        confusion(predicted, label, len(classes))
        for predicted, (_, label) in zip(found, val, strict=True)
    )
    network = scores(matrix, classes)
    # mmseg's metric rounds to two digits.
    if abs(network["miou"] - reported.metrics["mIoU"]) > 0.006:
        raise RuntimeError(
            f"tools/test.py reports a mIoU of {reported.metrics['mIoU']}, counted here "
            f"were {network['miou']:.3f}: the two must be the same network and data"
        )
    picked = np.linspace(0, len(val) - 1, 5).round().astype(int)[1:-1]
    plot_segmentation(
        [val[i][0] for i in picked],
        [val[i][1] for i in picked],
        [found[i] for i in picked],
        SegmentationLegend(classes, meta.palette),
        args.picture,
    )
    trained_on = frames(cfg, "train")
    weight = list(cfg.model.decode_head.loss_decode.class_weight)
    height, width = val[0][1].shape
    cost = count_model_macs(model, (height, width))
    pixels = matrix.sum(1)
    return dict(
        command="python benchmarks/camvid.py",
        training=dict(
            training,
            iterations=cfg.train_cfg.max_iters,
            batch_size=cfg.train_dataloader.batch_size,
            crop=list(cfg.model.data_preprocessor.size),
            seed=cfg.randomness.seed,
        ),
        seconds_per_image=reported.seconds_per_image,
        params=cost.params,
        macs=cost.macs,
        image_size=[height, width],
        frames=dict(train=len(trained_on), val=len(val)),
        val_share={
            name: 100.0 * float(pixels[i]) / float(pixels.sum())
            for i, name in enumerate(classes)
        },
        scores=dict(network=network, **baselines(trained_on, val, classes, weight)),
        environment=dict(
            environment(), mmengine=mmengine.__version__, mmseg=mmseg.__version__
        ),
    )


def table(result: dict[str, Any]) -> str:
    """The scores in Markdown, and how they were measured."""
    rows, classes = result["scores"], list(result["val_share"])
    lines = ["| | mIoU | pixel accuracy |", "| --- | --- | --- |"]
    for name, title in ROWS.items():
        title = title.format(constant=rows["constant"]["class"])
        row = rows[name]
        lines.append(f"| {title} | {row['miou']:.1f} | {row['accuracy']:.1f} |")
    lines += ["", "| class | pixels | network | constant | colour | colour, weighted |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name in classes:
        cells = [
            f"{rows[row]['iou'][name]:.1f}" if name in rows[row]["iou"] else "none"
            for row in ROWS
        ]
        lines.append(
            f"| {name} | {result['val_share'][name]:.1f} | {' | '.join(cells)} |"
        )
    training, place = result["training"], result["environment"]
    height, width = result["image_size"]
    lines.append(
        f"\nPercent of {result['frames']['val']} validation frames, void left out; IoU "
        f"by class in the second table. `{result['command']}`: "
        f"{result['frames']['train']} training frames, {training['iterations']} "
        f"iterations of {training['batch_size']} crops of {training['crop'][0]}x"
        f"{training['crop'][1]}, seed {training['seed']}, trained in "
        f"{training['seconds'] / 60:.1f} minutes, {training['cpu_seconds'] / 60:.1f} "
        "of them on the processor, with "
        f"{training['threads']} CPU thread{'s' if training['threads'] > 1 else ''} "
        f"({place['device']}), torch {place['torch']}, mmseg {place['mmseg']}. "
        f"{result['params'] / 1e6:.2f} M parameters, {result['macs'] / 1e9:.2f} GMACs "
        f"and {result['seconds_per_image']:.3f} s per frame of {height}x{width}. One "
        "run, one seed."
    )
    return "\n".join(lines) + "\n"


def page_with(result: dict[str, Any], text: str) -> str:
    """The page's text with the tables between its two marks."""
    return replace_between(text, BEGIN, END, table(result))


def main() -> None:
    args = parse_args()
    if args.docs:
        stored = json.loads(args.json.read_text())
        write_text_atomically(PAGE, page_with(stored, PAGE.read_text()))
        return
    result = measure(args)
    print(table(result))
    write_json_atomically(args.json, result)
    print(f"written to {args.json} and {args.picture}")


if __name__ == "__main__":
    run_cli(main)
