"""Time and memory of the auxiliary branch: ours, the naive form, and fused softmax.

python benchmarks/auxiliary_branch.py           # measure (10 minutes), store the result
python benchmarks/auxiliary_branch.py --docs    # write the page from the stored result

Every cell is a forward and a backward pass of one image with 6 heads of 64 channels.
Times are taken in turns in one process; peak memory in a fresh process per cell.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import duration, spread
from torch import Tensor

from mmcastling.analysis import paired_seconds
from mmcastling.analysis.machine import PeakMemory, environment
from mmcastling.attention import (
    masked_softmax_attention,
    naive_masked_softmax_attention,
)
from mmcastling.checkpoint import write_json_atomically, write_text_atomically
from mmcastling.models import CastlingViT
from mmcastling.verbs import set_mask

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "auxiliary_branch.json"
PAGE = ROOT / "docs" / "auxiliary_branch.md"
COMMAND = "python benchmarks/auxiliary_branch.py"

HEADS, HEAD_DIMS = 6, 64
TOKENS = (196, 1024, 4200, 8400)
PEERS_UP_TO = 4200  # beyond, ours alone
THRESHOLDS = (0.001, 0.02, 0.2, 0.9)
# Standard deviation of the logits: normal ones, and more peaked ones.
SHARPNESS = (1.0, 3.0)
REPEATS = {196: 41, 1024: 15, 4200: 5, 8400: 2}
# A training step is measured on a ViT-S at this image size: 1,024 tokens.
STEP_IMAGE, STEP_REPEATS = 512, 9

CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "naive": naive_masked_softmax_attention,
    "ours": masked_softmax_attention,
    "fused": lambda q, k, v, threshold: (
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ),
}


# ------------------------------------------------------------------------- measuring


def make_pass(
    name: str, tokens: int, threshold: float, sharpness: float, device: str
) -> Callable[[], Any]:
    """A forward and a backward pass of a contender."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, tokens, HEAD_DIMS)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    q, k, v, grad = (t.to(device) for t in (sharpness * q, k, v, grad))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    attention = CONTENDERS[name]

    def run() -> Any:
        return torch.autograd.grad(
            attention(*inputs, threshold=threshold), inputs, grad
        )

    return run


def contenders(tokens: int) -> list[str]:
    return list(CONTENDERS) if tokens <= PEERS_UP_TO else ["ours"]


def measure_memory(
    name: str, tokens: int, threshold: float, sharpness: float, device: str
) -> int:
    """Peak bytes beyond the inputs; gradients of q, k and v are among them."""
    make_pass(name, 64, threshold, sharpness, device)()  # libraries set themselves up
    run = make_pass(name, tokens, threshold, sharpness, device)
    with PeakMemory(device) as peak:
        run()
    return peak.bytes


@functools.cache
def memory_in_fresh_process(*cell: Any) -> int:
    command = [sys.executable, __file__, "--memory-of", *map(str, cell)]
    return int(subprocess.check_output(command, text=True).split()[-1])


def memory_cell(name: str, cell: tuple[int, float, float, str]) -> tuple[Any, ...]:
    """What memory depends on: of the peers', the threshold and sharpness are not it."""
    tokens, threshold, sharpness, device = cell
    if name != "ours":
        threshold, sharpness = THRESHOLDS[0], SHARPNESS[0]
    return name, tokens, threshold, sharpness, device


def measure_cell(
    tokens: int, threshold: float, sharpness: float, device: str
) -> dict[str, Any]:
    """All contenders at one size, threshold and sharpness."""
    names = contenders(tokens)
    cell = (tokens, threshold, sharpness, device)
    seconds = paired_seconds(
        {name: make_pass(name, *cell) for name in names}, REPEATS[tokens]
    )
    return dict(
        tokens=tokens,
        threshold=threshold,
        sharpness=sharpness,
        **survival(tokens, threshold, sharpness),
        seconds={name: spread(values) for name, values in seconds.items()},
        memory={
            name: memory_in_fresh_process(*memory_cell(name, cell)) for name in names
        },
    )


def survival(tokens: int, threshold: float, sharpness: float) -> dict[str, float]:
    """The fractions of pairs and of rows that survive, on the same inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, tokens, HEAD_DIMS)
    q, k = (torch.randn(shape, generator=generator) for _ in range(2))
    rows = torch.zeros(())
    pairs = torch.zeros(())
    for head in range(HEADS):
        logits = sharpness * q[0, head] @ k[0, head].T / math.sqrt(HEAD_DIMS)
        mask = torch.softmax(logits, dim=-1) > threshold
        pairs += mask.float().mean() / HEADS
        rows += mask.any(dim=-1).float().mean() / HEADS
    return dict(density=pairs.item(), active_rows=rows.item())


def measure_step(device: str) -> dict[str, Any]:
    """A training step of a ViT-S: branch on, branch off, and no branch at all."""

    def make_step(kind: str, threshold: float | str | None) -> Callable[[], None]:
        torch.manual_seed(0)
        model = CastlingViT(
            "small",
            img_size=STEP_IMAGE,
            out_type="featmap",
            with_cls_token=False,
            attention=dict(type=kind),
        ).to(device)
        if threshold is not None:
            set_mask(model, threshold)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        image = torch.randn(1, 3, STEP_IMAGE, STEP_IMAGE, device=device)

        def step() -> None:
            optimizer.zero_grad()
            model(image)[0].square().mean().backward()
            optimizer.step()

        return step

    steps = {
        "linear_angular": make_step("linear_angular", None),
        "off": make_step("castling", 1.0),
        "on": make_step("castling", "1/N"),
        "softmax": make_step("softmax", None),
    }
    seconds = paired_seconds(steps, STEP_REPEATS)
    ratios = [
        off / linear
        for off, linear in zip(seconds["off"], seconds["linear_angular"], strict=True)
    ]
    return dict(
        image=STEP_IMAGE,
        seconds={name: spread(values) for name, values in seconds.items()},
        off_over_linear_angular=spread(ratios),
    )


# ---------------------------------------------------------------------- what was asked


def memory_slope(cells: list[dict[str, Any]], threshold: float) -> float:
    """Slope of log memory over log tokens, from 1,024 tokens on, at sharpness 3."""
    points = [
        (math.log(cell["tokens"]), math.log(cell["memory"]["ours"]))
        for cell in cells
        if cell["threshold"] == threshold
        and cell["sharpness"] == SHARPNESS[-1]
        and cell["tokens"] >= 1024
    ]
    mean_x = statistics.fmean(x for x, _ in points)
    mean_y = statistics.fmean(y for _, y in points)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return covariance / sum((x - mean_x) ** 2 for x, _ in points)


def targets(result: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What was to be reached at 4,200 tokens: claim, measured, reached."""
    cells = result["cells"]
    large = [cell for cell in cells if cell["tokens"] == 4200]

    def ratios(kind: str, peer: str, least_threshold: float = 0.0) -> list[float]:
        def value(cell: dict[str, Any], name: str) -> float:
            entry = cell[kind][name]
            return entry["median"] if kind == "seconds" else entry

        return [
            value(cell, "ours") / value(cell, peer)
            for cell in large
            if cell["threshold"] >= least_threshold
        ]

    memory, time = ratios("memory", "naive"), ratios("seconds", "naive")
    fused = ratios("seconds", "fused", 0.02)
    by_threshold = {
        (cell["sharpness"], cell["threshold"]): cell["seconds"]["ours"]["median"]
        for cell in large
    }
    empty = [by_threshold[s, 0.9] / by_threshold[s, 0.001] for s in SHARPNESS]
    slopes = [memory_slope(cells, threshold) for threshold in THRESHOLDS]

    def line(claim: str, values: list[float], limit: float) -> tuple[str, str, bool]:
        measured = f"{min(values):.2f} to {max(values):.2f}"
        return f"{claim}, at most {limit:g}", measured, max(values) <= limit

    return [
        line("peak memory over the naive form's", memory, 0.1),
        line("time over the naive form's", time, 0.5),
        line("time over fused softmax's, thresholds from 0.02", fused, 1.5),
        line("time at threshold 0.9 over that at 0.001", empty, 0.7),
        line("log-log slope of memory, 1,024 to 8,400 tokens", slopes, 1.1),
    ]


# ------------------------------------------------------------------------------ page

PREAMBLE = """\
# The auxiliary branch: what training with it costs

Made by `{command}`; the figures are in
`benchmarks/results/auxiliary_branch.json`.
One run on {device}, {threads} threads, torch {torch}, Python {python}, float32. Another
machine gives other times; contenders were timed in turns, memory in a fresh process per
cell.

**ours** is `masked_softmax_attention`: tiles of queries against all keys, probabilities
computed again in the backward pass for the rows that have a survivor. **naive** keeps
the matrices of all pairs. **fused** is torch's `scaled_dot_product_attention`, which
has no mask to make: what softmax attention itself costs. All are a forward and a
backward pass of one image with {heads} heads of {dims} channels.

## Targets, at 4,200 tokens

| | measured | reached |
| --- | --- | --- |
"""

CELLS = """
## All cells

Logits are normal with standard deviation 1 and 3 (a more peaked attention). Density is
the fraction of pairs above the threshold, rows the fraction of queries with at least
one. Milliseconds are medians (quartiles), MB peak memory beyond the inputs, gradients
included.

| tokens | std | threshold | density | rows | ours ms | naive ms | fused ms \
| ours MB | naive MB | fused MB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""

BOUNDS = """
What bounds it: the scores. All pairs need one product of queries and keys, a softmax
and a maximum, whatever survives, which is the cost at threshold 0.9. A row with a
survivor needs that product again in the backward pass, with one more for each of the
gradients of probabilities, queries, keys and values, because the softmax couples its
whole row; rows without a survivor need nothing. Memory holds the gradients, a copy of
the scaled queries, one probability per row, and three tiles whose size does not depend
on the number of tokens. A fused pass's log-sum-exp would save nothing: matrix products
take most of the time, the softmax of a tile that is in the cache a tenth. Few tokens
(196) gain nothing either, since the naive form's matrices are small.
"""

STEP = """
## A training step once the branch is off

ViT-S/16 at {image}x{image}, batch 1, forward, backward and AdamW, {repeats} rounds in
turns:

| attention | seconds per step |
| --- | --- |
"""


def page(result: dict[str, Any]) -> str:
    """The page in Markdown."""
    text = PREAMBLE.format(
        command=COMMAND, heads=HEADS, dims=HEAD_DIMS, **result["environment"]
    )
    for claim, measured, reached in targets(result):
        text += f"| {claim} | {measured} | {'yes' if reached else '**no**'} |\n"
    text += CELLS + "".join(cell_line(cell) for cell in result["cells"]) + BOUNDS
    step = result["step"]
    text += STEP.format(image=step["image"], repeats=STEP_REPEATS)
    labels = {
        "linear_angular": "linear-angular, no branch",
        "off": "castling, branch off",
        "on": "castling, branch on at 1/N",
        "softmax": "softmax",
    }
    for name, label in labels.items():
        text += f"| {label} | {duration(step['seconds'][name], 1.0, 3)} |\n"
    ratio = step["off_over_linear_angular"]
    return text + (
        f"\nOff over linear-angular, round by round: {duration(ratio, 1.0, 3)}. The "
        "two run the same operations (a test compares their autograd graphs).\n"
    )


def cell_line(cell: dict[str, Any]) -> str:
    def column(kind: str, name: str) -> str:
        value = cell[kind].get(name)
        if value is None:
            return ""
        return duration(value, 1e3, 1) if kind == "seconds" else f"{value / 1e6:,.0f}"

    names = ("ours", "naive", "fused")
    cells = [
        f"{cell['tokens']:,}",
        f"{cell['sharpness']:g}",
        f"{cell['threshold']:g}",
        f"{cell['density']:.2g}",
        f"{cell['active_rows']:.2g}",
        *(column("seconds", name) for name in names),
        *(column("memory", name) for name in names),
    ]
    return f"| {' | '.join(cells)} |\n"


# ------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, default=STORED, metavar="FILE", help="result (%(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--docs", action="store_true", help="only write the page from the result"
    )
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        name, tokens, threshold, sharpness, device = args.memory_of
        cell = (int(tokens), float(threshold), float(sharpness), device)
        print(measure_memory(name, *cell))
        return
    if not args.docs:
        cells = []
        for tokens in TOKENS:
            for sharpness in SHARPNESS:
                for threshold in THRESHOLDS:
                    cell = measure_cell(tokens, threshold, sharpness, args.device)
                    cells.append(cell)
                    print(cell_line(cell), end="", flush=True)
        result = dict(
            command=COMMAND,
            environment=environment(args.device),
            cells=cells,
            step=measure_step(args.device),
        )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(args.json, result)
    result = json.loads(args.json.read_text())
    for claim, measured, reached in targets(result):
        print(f"{'reached' if reached else 'MISSED '}  {claim}: {measured}")
    if args.docs:
        write_text_atomically(PAGE, page(result))


if __name__ == "__main__":
    main()
