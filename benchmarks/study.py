"""The study: what each part's command is, what is left of it, and the page.

python -m benchmarks.study           # parts, commands, time that is left
python -m benchmarks.study report    # docs/study.md and README's table, from results

Every run is a file in ``benchmarks/results``; a command that was stopped goes on after
the last file, and inside a run after its last epoch or validation.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmcastling.checkpoint import write_text_atomically
from mmcastling.run import run_cli

sys.path.insert(0, str(Path(__file__).parent))  # the scripts beside it, also under -m
fashion = importlib.import_module("fashion")
align = importlib.import_module("align_dinov2")
dinov2 = importlib.import_module("dinov2_finetuned")
marked = importlib.import_module("marked")
intervals = importlib.import_module("intervals")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README = ROOT / "docs" / "study.md", ROOT / "README.md"
CURVES = ROOT / "docs" / "assets" / "study_curves.png"
BEGIN, END = "<!-- study-table -->\n", "<!-- /study-table -->"
PLAIN, CONTROL = "softmax", "control"
SEEDS = (0, 1, 2)

Runs = dict[int, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs that one command carries out.

    Args:
        title: What they show.
        command: What anyone runs.
        folder: Of ``benchmarks/results``.
        runs: Names of the files, without ``.json``.
    """

    title: str
    command: str
    folder: str
    runs: Sequence[str]

    def state(self) -> str:
        """What is stored, and core-hours: spent, and left at the mean of these."""
        paths = [RESULTS / self.folder / f"{run}.json" for run in self.runs]
        found = [json.loads(path.read_text()) for path in paths if path.is_file()]
        spent = [run["cpu_seconds"] / 3600 for run in found if "cpu_seconds" in run]
        text = f"{len(found)} of {len(paths)} runs"
        if spent:
            left = statistics.mean(spent) * (len(paths) - len(found))
            text += f", {sum(spent):.1f} core-hours; about {left:.1f} are left"
        return text


def parts() -> list[Part]:
    """All parts, in the order in which they need each other."""
    rows = fashion.ROWS
    script = "python benchmarks/fashion.py"
    found = [
        Part(
            "Fashion-MNIST, learning rates",
            f"{script} rates --amp",
            "fashion",
            [f"rate-{row}-{rate:g}" for row in rows for rate in fashion.RATES],
        ),
        Part(
            "Fashion-MNIST, from scratch",
            f"{script} train --amp",
            "fashion",
            [f"train-{row}-{seed}" for seed in SEEDS for row in rows],
        ),
        Part(
            "Fashion-MNIST, castled from softmax",
            f"{script} finetune --amp",
            "fashion",
            [f"finetune-{row}-{seed}" for seed in SEEDS for row in fashion.STARTS],
        ),
    ]
    for task in dinov2.TASKS:
        found.append(
            Part(
                f"DINOv2-S on {task}",
                f"python benchmarks/dinov2_finetuned.py {task} data/dinov2_s --amp",
                "dinov2_finetuned",
                [f"{task}-{row}-{seed}" for seed in SEEDS for row in dinov2.ROWS],
            )
        )
    return found


def runs_of(kind: str, row: str) -> Runs:
    """Stored runs of Fashion-MNIST by seed."""
    found = {}
    for path in sorted(fashion.STORED.glob(f"{kind}-{row}-*.json")):
        seed = path.stem.removeprefix(f"{kind}-{row}-")
        if seed.isdigit():  # else it is of a row whose name goes on
            found[int(seed)] = json.loads(path.read_text())
    return found


def stored_rows(kind: str, names: Iterable[str]) -> dict[str, Runs]:
    """The rows of ``names`` of which any run is stored."""
    found = {name: runs_of(kind, name) for name in names}
    return {name: runs for name, runs in found.items() if runs}


def minus(runs: Runs, others: Runs | None) -> str:
    """The difference of accuracies, paired; empty for a row and itself, or nothing."""
    if others is None or runs is others:
        return ""
    difference = intervals.paired(accuracies(runs), accuracies(others))
    return difference.text(2, signed=True) if difference else ""


def accuracies(runs: Runs, scale: str = "1.0") -> dict[int, float]:
    """Percent of the test set by seed, of pictures enlarged."""
    return {seed: run["accuracy"][scale] for seed, run in runs.items()}


# -- the page --------------------------------------------------------------------------

INTRODUCTION = f"""\
# Study: attentions trained to the end

Written by `python -m benchmarks.study report` from the runs in `benchmarks/results`;
without `report` it says what each part's command is and how much of it is left.

A figure is the mean over seeds and the half-width of its 95% interval (Student's t),
which one seed does not have. Seeds are paired: all rows of a seed see the same batches
and start from the same weights wherever they have the same ones; a difference is that
of each seed, averaged. With 3 seeds intervals are wide (t = 4.3): "not told apart" is
not "equal".

## Fashion-MNIST, from scratch

The first {fashion.TRAINED:,} training pictures, flipped at random, {fashion.EPOCHS}
epochs, batches of {fashion.BATCH}; all 10,000 test pictures, once, at the end. The
network has two layers of attention on 196 tokens (64 channels, one head), with four
convolutions before them and one of stride 2 behind them, of whose map the classifier
reads {fashion.PARTS}x{fashion.PARTS} means. Each row has the learning rate, of three,
that was best on the last 5,000 training pictures after {fashion.RATE_EPOCHS} epochs of
{fashion.RATE_PICTURES:,}. The full method's masks begin at `1/N` and are off after 0.7
of training. Enlarged pictures (1.5 and 2 times as wide) were not trained on.
"""

FINETUNED = f"""\
## Fashion-MNIST, castled from softmax

The softmax networks above, finetuned for {fashion.FINETUNE_EPOCHS} epochs more: with
softmax, castled, and castled and aligned first (`mmcastling.align`, without labels, on
training pictures). On 196 tokens 8x8 landmarks are not far from softmax itself.
"""

DENSE = """\
## Detection and segmentation

The networks that were finetuned from DINOv2-S on hand-outlined nuclei and on road
scenes are in [Align](align.md#what-it-is-worth-after-finetuning).
"""

EARLIER = """
## What short trainings said

An earlier study, now gone, compared networks that had hardly begun to learn (64 tokens,
24,000 pictures seen, 74 to 79% right, 3 to 5 seeds). It found the convolution on the
grid of tokens 2.3 ± 1.8 points ahead of the one along their line, and convolution and
output norm worth 3.0 ± 0.4 points to softmax itself; it could not tell apart schedules
of the masks (threshold or weight, off after .5, .7 or .9 of training), nor
`reference_tokens`. Its ranking of attentions is replaced by the one above.
"""


def page() -> str:
    """The page in Markdown."""
    lines = [INTRODUCTION, *scratch_table(), ""]
    if CURVES.is_file():
        lines += ["![Validation over training](assets/study_curves.png)", ""]
    lines += [FINETUNED, *finetuned_table(), "", DENSE, "## What is left", ""]
    lines += ["| part | stored | command |", "| --- | --- | --- |"]
    for part in parts():
        lines.append(f"| {part.title} | {part.state()} | `{part.command}` |")
    return "\n".join([*lines, EARLIER])


def scratch_table() -> list[str]:
    """Rows trained from scratch."""
    by_row = stored_rows("train", fashion.ROWS)
    if not by_row:
        return ["No run is stored yet."]
    lines = [
        "| attention | seeds | accuracy | minus softmax | minus control | 1.5x | 2x "
        "| rate | MMACs | core-minutes |",
        "| --- " * 10 + "|",
    ]
    for runs in by_row.values():
        any_run = next(iter(runs.values()))
        cells = [any_run["title"], str(len(runs)), _text(accuracies(runs))]
        cells += [minus(runs, by_row.get(other)) for other in (PLAIN, CONTROL)]
        cells += [_text(accuracies(runs, scale), 1) for scale in ("1.5", "2.0")]
        minutes = statistics.mean(run["cpu_seconds"] for run in runs.values()) / 60
        cells += [f"{any_run['settings']['rate']:g}", f"{any_run['macs'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} | {minutes:.0f} |")
    pruned = [
        abs(run["before"] - run["accuracy"]["1.0"])
        for runs in by_row.values()
        for run in runs.values()
    ]
    lines += [
        "",
        f"Pruning changed the accuracy of no run by more than {max(pruned):.2f} "
        f"points. {_machine(any_run)}.",
    ]
    return lines


def finetuned_table() -> list[str]:
    """A trained softmax network, castled and finetuned."""
    by_row = stored_rows("finetune", fashion.STARTS)
    if not by_row:
        return ["No run is stored yet."]
    lines = [
        "| network | seeds | castled, validation | aligned, validation | finetuned | "
        "minus softmax | 1.5x | 2x |",
        "| --- " * 8 + "|",
    ]
    for row, runs in by_row.items():
        cells = [fashion.STARTS[row], str(len(runs))]
        for stage in ("castled", "aligned"):
            values = {s: run[stage] for s, run in runs.items() if stage in run}
            cells.append(_text(values) if values else "")
        cells += [_text(accuracies(runs)), minus(runs, by_row.get(PLAIN))]
        cells += [_text(accuracies(runs, scale), 1) for scale in ("1.5", "2.0")]
        lines.append(f"| {' | '.join(cells)} |")
    times = fashion.STORED / f"{align.TIMES}.json"
    if times.is_file():
        text = align.times_text(times)
        lines += ["", f"Milliseconds of a picture, softmax and castled: {text}."]
    return lines


def readme_table() -> str:
    """README's table of what was trained to the end, once there is something to
    compare."""
    lines = [
        "| Fashion-MNIST, 196 tokens, from scratch | seeds | accuracy, % |",
        "| --- | --- | --- |",
    ]
    for runs in stored_rows("train", fashion.ROWS).values():
        title = next(iter(runs.values()))["title"]
        lines.append(f"| {title} | {len(runs)} | {_text(accuracies(runs))} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def _text(values: dict[int, float], digits: int = 2) -> str:
    return intervals.interval(list(values.values())).text(digits)


def _machine(run: dict[str, Any]) -> str:
    found = run["environment"]
    precision = "bfloat16" if run["settings"]["amp"] else "float32"
    return (
        f"Trained in {precision} on one thread of {found['device']}, torch "
        f"{found['torch']}"
    )


def draw_curves(path: Path) -> None:
    """Validation over the epochs, a line for each row, the mean of its seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, runs in enumerate(stored_rows("train", fashion.ROWS).values()):
        curves = [run["curve"] for run in runs.values()]
        means = [statistics.mean(values) for values in zip(*curves, strict=True)]
        title = next(iter(runs.values()))["title"]
        style = ("-", "--", ":")[i % 3]
        axes.plot(range(1, len(means) + 1), means, style, marker="o", ms=3, label=title)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy on the validation part, %")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="?", choices=("state", "report"), default="state")
    if parser.parse_args().what == "state":
        for part in parts():
            print(f"{part.title}: {part.state()}\n    {part.command}")
        return
    if stored_rows("train", fashion.ROWS):
        draw_curves(CURVES)
    write_text_atomically(PAGE, page())
    text = marked.replace_between(README.read_text(), BEGIN, END, readme_table())
    write_text_atomically(README, text)


if __name__ == "__main__":
    run_cli(main)
