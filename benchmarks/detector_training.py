"""Memory and time of training a detector with the auxiliary branch on, and off.

python benchmarks/detector_training.py --data-root FOLDER   # measure, store the result
python benchmarks/detector_training.py --docs               # write the page from it

Trains ``configs/mask_rcnn_castling_s_coco.py`` as it is, 1024x1024 pixels, for a few
iterations of one image, each contender in a fresh process: the auxiliary branch in its
naive form, in ours, and switched off. FOLDER has COCO's layout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmcastling.analysis.machine import PeakMemory, environment
from mmcastling.attention import castling, naive_masked_softmax_attention
from mmcastling.checkpoint import write_json_atomically, write_text_atomically
from mmcastling.run import load_config, train
from mmcastling.verbs import castling_modules

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "detector_training.json"
PAGE = ROOT / "docs" / "detector_training.md"
CONFIG = ROOT / "configs" / "mask_rcnn_castling_s_coco.py"
COMMAND = "python benchmarks/detector_training.py --data-root FOLDER"

ITERATIONS = 5
# Label and threshold of the branch.
CONTENDERS: dict[str, tuple[str, str | float]] = {
    "naive": ("branch on, naive", "1/N"),
    "ours": ("branch on, ours", "1/N"),
    "off": ("branch off", 1.0),
}


def measure(name: str, data_root: str, seed: int = 0) -> dict[str, Any]:
    """Train a contender in this process."""
    _, threshold = CONTENDERS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "data_root": data_root,
            "train_dataloader.batch_size": 1,
            "train_dataloader.num_workers": 0,
            "train_dataloader.persistent_workers": False,
            "train_cfg.max_iters": ITERATIONS,
            "train_cfg.val_begin": ITERATIONS + 1,  # never
            "default_hooks.checkpoint.interval": ITERATIONS + 1,
            "default_hooks.checkpoint.save_last": False,
            "default_hooks.logger.interval": 1,
            "randomness": dict(seed=seed),
        }
        cfg = load_config(CONFIG, options, folder)
        cfg.custom_hooks = [
            dict(type="MaskDecayHook", mode="none", start=threshold, interval=1)
        ]
        if name == "naive":
            castling.masked_softmax_with_state = _naive_with_state
        with PeakMemory(device) as peak:
            model = train(cfg)
        (log,) = Path(folder).glob("*/vis_data/scalars.json")
        records = [json.loads(line) for line in log.read_text().splitlines()]
        records = [record for record in records if "loss" in record]
    attentions = sum(1 for _ in castling_modules(model))
    return dict(
        name=name,
        peak_bytes=peak.bytes,
        seconds=[record["time"] for record in records],
        mask_density=[record.get("mask_density") for record in records],
        losses=[record["loss"] for record in records],
        attentions_with_branch=attentions,
        environment=environment(device),
    )


def _naive_with_state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    probability, multiple, weight, _ = state.tolist()
    return naive_masked_softmax_attention(
        q,
        k,
        v,
        bias,
        threshold=f"{probability!r}+{multiple!r}/N",
        weight=weight,
        return_density=True,
    )


def measure_in_fresh_process(name: str, data_root: str) -> dict[str, Any]:
    """As :func:`measure`; where the process dies, what it died of."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--data-root", data_root]
        done = subprocess.run([*command, "--only", name, "--json", str(out)])
        if done.returncode:
            return dict(name=name, failed=f"ended with status {done.returncode}")
        return json.loads(out.read_text())


PREAMBLE = """\
# Training a detector with the auxiliary branch

Made by `{command}`; the figures are in
`benchmarks/results/detector_training.json`.
Mask R-CNN with Castling-ViT-S/16 as `configs/mask_rcnn_castling_s_coco.py` has it
(1024x1024, 4,096 tokens, 12 layers of 6 heads, no activation checkpointing), but one
image per iteration and {iterations} iterations. One run on {device}, {threads} threads,
torch {torch}, float32, a fresh process per row on real COCO images.

| attention | peak memory | seconds per iteration | mask density |
| --- | --- | --- | --- |
"""

NOTES = """
Peak memory is the process's beyond what it held before training was set up. Seconds are
the median after the first iteration (smallest to largest). The threshold is 1/N, which
keeps about half of the pairs of an untrained network and lets no row be skipped: the
most expensive state of the branch. A row that ended with a status was not measured.

The stored figures are from before the config had mmdet's standard heads in place of
ViTDet's, which cost more, and the same in all three rows.
"""


def page(result: dict[str, Any]) -> str:
    """The page in Markdown."""
    rows = {row["name"]: row for row in result["rows"]}
    text = PREAMBLE.format(
        command=COMMAND, iterations=ITERATIONS, **result["environment"]
    )
    for name, (label, *_) in CONTENDERS.items():
        text += row_line(label, rows[name])
    return text + NOTES


def iteration_seconds(means: list[float]) -> list[float]:
    """Seconds of each iteration, from the running means that MMEngine logs."""
    totals = [count * mean for count, mean in enumerate(means, start=1)]
    return [
        total - before for total, before in zip(totals, [0.0, *totals], strict=False)
    ]


def row_line(label: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {label} | {row['failed']} | | |\n"
    seconds = iteration_seconds(row["seconds"])[1:]
    density = [value for value in row["mask_density"] if value is not None]
    return (
        f"| {label} | {row['peak_bytes'] / 1e9:.2f} GB "
        f"| {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        f" | {f'{statistics.fmean(density):.2g}' if density else ''} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", metavar="FOLDER", help="COCO 2017, or a part")
    parser.add_argument(
        "--json", type=Path, default=STORED, metavar="FILE", help="result (%(default)s)"
    )
    parser.add_argument(
        "--docs", action="store_true", help="only write the page from the result"
    )
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.docs:
        write_text_atomically(PAGE, page(json.loads(args.json.read_text())))
        return
    if args.data_root is None:
        parser.error("--data-root FOLDER is needed: a folder with COCO's layout")
    if args.only:
        args.json.write_text(json.dumps(measure(args.only, args.data_root)))
        return
    rows = []
    for name, (label, *_) in CONTENDERS.items():
        rows.append(measure_in_fresh_process(name, args.data_root))
        print(row_line(label, rows[-1]), end="", flush=True)
    place = next(row.pop("environment") for row in rows if "environment" in row)
    for row in rows:
        row.pop("environment", None)
    result = dict(command=COMMAND, environment=place, rows=rows)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(args.json, result)


if __name__ == "__main__":
    main()
