"""Tables and plots from the stored results of the speed benchmarks.

python benchmarks/report.py   # write docs/speed.md, its pictures and the README's table
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attention
import backbones
import detectors
import precision
import runtimes
import speed_figures
import training_steps
from common import (
    ROOT,
    Benchmark,
    Target,
    cell_of,
    duration,
    kind_of,
    line,
    load,
    median,
)
from marked import replace_between

from mmcastling.checkpoint import write_text_atomically
from mmcastling.deploy.choosing import GAIN, NEAR

PAGE = ROOT / "docs" / "speed.md"
README = ROOT / "README.md"
ASSETS = ROOT / "docs" / "assets"
SCRIPTS = {
    module.BENCHMARK.name: module
    for module in (
        attention,
        backbones,
        precision,
        detectors,
        runtimes,
        training_steps,
    )
}
Results = dict[str, Any]
Machines = dict[str, dict[str, Results]]
"""Results by kind of machine, and by benchmark."""

BEGIN, END = "<!-- speed-table -->\n", "<!-- /speed-table -->"
TWINS = {
    "Castling-ViT-S": "ViT-S, softmax",
    "Castling-MViTv2-T": "MViTv2-T, softmax",
    "Castling-LeViT-256": "LeViT-256, softmax",
}

PREAMBLE = """\
# Deployed speed

Made by `python benchmarks/report.py` from the results that these commands stored in
`benchmarks/results`, all contenders of a size in one run, in files that are named by
the instruction set:

{commands}

{machines}
Figures are compared within one kind of machine alone. They are in float32 with batch 1
and the default allocator, where nothing else is said.
{missing}
Within a script contenders take turns, so that a machine that grows slower hits all
alike; another machine gives other times. Milliseconds are medians (quartiles) of
forward passes in inference mode, weights are random. Memory is the peak beyond weights
and input, of a first pass in a fresh process. Castled models are deployed. `--device
cuda` runs the same scripts with synchronised clocks; that has not been tried.

## Targets

A figure in bold misses its target; "-" is where it was not measured.

"""

MISSING = """
Not stored yet, so that their parts of this page are not there: {}.
"""

HEADER = """\
| size | | ms | peak MB | GMACs |
| --- | --- | --- | --- | --- |
"""

ATTENTION = """
## Attention layers

384 channels, 6 heads, tokens as a grid. *projections* is the layer's linear layers
alone, the floor for any attention between them; *landmarks* is castling in the form
for trained weights, as `castle` has it; *released* the form for training from scratch
in the authors' order of operations in eager mode, between torch's linear layers. All
others compute theirs as deployed models do, by oneDNN in one pass.

"""

ROOFLINE = """
What bounds it: the projections take {share:.0%} of castling's time at 4,200 tokens.
They are matrix products, which ran at these GFLOP/s in the same run, by torch's linear
layer itself and as deployed models compute it:

| product | GFLOP/s |
| --- | --- |
"""

BACKBONES = """
## Backbones

In the form that a detector takes, all levels of features. *no mixing* is the plain
network whose attentions are their projections alone. It and the softmax twins have the
linear layers that deployment makes, too.

"""

PICTURES = """\
![Latency and memory against resolution, {kind}](assets/speed_resolution_{kind}.png)
![Latency against MACs at 800x1344, {kind}](assets/speed_macs_{kind}.png)

"""

MIXING = """
What bounds it: at 800x1344 mixing adds {share:.1%} to the MACs of the network without
it, and would cost as much if its products ran as fast as linear layers and nothing else
took time. The rest is passes over memory: norms of queries, keys and outputs, the sum
with the values, and the convolution.
"""

PRECISION = """
## Lower precision

The ViT-S backbone at 800x1344. `bf16` rounds linear layers and convolutions; `int8`
quantizes linear layers, weights once and inputs as they arrive; norms and the sums of
attention stay float32. Of a detector `bf16` rounds neck and heads too, and `int8` has
them in bfloat16 where the processor gains by it. What bounds both: of float32's time
only the products of layers shrink, while norms, sums, activations and conversions
between formats do not.

`--precision auto` of `tools/test.py` and `tools/convert.py` times float32, and what the
processor's instructions may speed up, at the size of the first test image, and
remembers what it found for this machine, model and size. It goes from the most exact
precision to the least (fp32, bf16, fp16, int8) and takes each that needs at most
{gain:.0%} of the time of the one taken before, if its features stay within {near:.0%}
of float32's largest. In code: `mmcastling.deploy.best_precision(model, (800, 1344))`.

"""

LIBRARIES = """
One linear layer, 4,200 tokens from 384 to 1,536 channels, in eager mode:

| | ms |
| --- | --- |
"""

ACCURACY = """
The demo's detector on its 24 validation tiles, by `tools/test.py --precision`:

| precision | bbox AP | segm AP | s / image |
| --- | --- | --- | --- |
"""

LACKING = "\nNot measured: {reasons}.\n"
AUTO = "\nWhat the command said of it: `{said}`.\n"

DETECTORS = """
## Detectors

One image of noise through `test_step`, in float32 where no precision is named. Weights
are random, with the first class made likely, so that there are as many boxes as a
detector may return.

"""

PARTS = """
Where the time goes, in ms, in further passes by turns, RTMDet at 1280x1280. *reading*
is the config's pipeline on a JPEG: decode, resize, pad. *heads* is the rest, with
proposals, suppression and masks, and *of it after* what comes after the last layer:

| | reading | preparing | backbone | neck | heads | of it after | detections |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

TRAINING = """
## Training steps

512x512, forward, backward and AdamW. Memory includes gradients and the optimizer's
state; GMACs are those of a forward pass. What the auxiliary branch costs at other sizes
and thresholds: [auxiliary_branch.md](auxiliary_branch.md).

"""


def read(paths: Sequence[Path]) -> Machines:
    """Stored results by kind of machine, checked to belong together.

    Args:
        paths: Result files ``BENCHMARK/KIND.json``.

    Raises:
        ValueError: If a file is not of a known benchmark, does not exist, is not
            complete, or was made on a machine of another kind than it is named by, or
            on another machine than those of its kind.
    """
    machines: Machines = {}
    for path in paths:
        name, kind = path.parent.name, path.stem
        if name not in SCRIPTS:
            raise ValueError(
                f"{path} is not the result of a known benchmark: expected a folder "
                f"among {list(SCRIPTS)}"
            )
        benchmark = SCRIPTS[name].BENCHMARK
        if not path.exists():
            raise ValueError(f"{path} does not exist: run {benchmark.command}")
        results = machines.setdefault(kind, {})
        result = results[name] = load(path)
        _check_complete(benchmark, result, path)
        if kind != kind_of(result):
            raise ValueError(
                f"{path} was measured on {result['environment']['device']}: name it "
                f"{kind_of(result)}.json"
            )
        first, *_ = results
        for key in ("device", "threads"):
            value = results[first]["environment"][key]
            if (other := result["environment"][key]) != value:
                raise ValueError(
                    f"{path} was measured with {key} {other!r}, {first}/{path.name} "
                    f"with {value!r}: of a kind one machine is reported; run "
                    f"{benchmark.command} there again"
                )
    return machines


def _check_complete(benchmark: Benchmark, result: dict[str, Any], path: Path) -> None:
    found = {(cell["contender"], tuple(cell["size"])) for cell in result["cells"]}
    wanted = {
        (name, size)
        for size in benchmark.repeats
        for name in benchmark.at(size, list(benchmark.contenders))
        if name not in result.get("lacking", {})  # where it was measured
    }
    if missing := sorted(wanted - found):
        raise ValueError(
            f"{path} lacks {missing}: run {benchmark.command} without --only"
        )


def page(machines: Machines) -> str:
    """The page in Markdown: a section for each benchmark whose result is stored."""
    stored = [
        name for name in SCRIPTS if any(name in found for found in machines.values())
    ]
    command = {name: f"`{SCRIPTS[name].BENCHMARK.command}`" for name in SCRIPTS}
    absent = [
        f"{command[name]} ({', '.join(lacking)})"
        for name in SCRIPTS
        if (lacking := [kind for kind, found in machines.items() if name not in found])
    ]
    places: dict[tuple[str, ...], list[str]] = {}
    for kind, found in machines.items():
        for name, result in found.items():
            place = (kind, *map(str, result["environment"].values()))
            places.setdefault(place, []).append(name)
    facts = [*next(iter(next(iter(machines.values())).values()))["environment"]]
    rows = [["kind", *facts, "scripts"], ["---"] * (len(facts) + 2)]
    rows += [[*place, ", ".join(names)] for place, names in places.items()]
    text = PREAMBLE.format(
        commands="\n".join(f"- {command[name]}" for name in stored),
        machines="".join(f"| {' | '.join(row)} |\n" for row in rows),
        missing=MISSING.format(", ".join(absent)) if absent else "",
    )
    text += targets_table(machines)
    for name in stored:
        intro, section = SECTIONS[name]
        text += intro.format(gain=GAIN, near=NEAR)
        for kind, found in machines.items():
            if name in found:
                text += f"### On {kind}\n\n{section(found[name])}\n"
    return text.rstrip() + "\n"


def targets_table(machines: Machines) -> str:
    """All targets, a column for each kind of machine."""
    found = {
        kind: {target.text: target for target in targets(results)}
        for kind, results in machines.items()
    }
    text = f"| | {' | '.join(found)} |\n| ---{' | ---' * len(found)} |\n"
    for claim in dict.fromkeys(claim for column in found.values() for claim in column):
        cells = []
        for column in found.values():
            target = column.get(claim)
            value = f"{target.measured:.3g}" if target else "-"
            cells.append(value if not target or target.reached else f"**{value}**")
        text += f"| {claim} | {' | '.join(cells)} |\n"
    return text


def attention_section(result: Results) -> str:
    floor, whole = (
        median(result, name, (50, 84)) for name in ("projections", "castling")
    )
    text = table(result) + ROOFLINE.format(share=floor / whole)
    for name, value in result["gemm"].items():
        text += f"| {name} | {value['median']:,.0f} |\n"
    return text


def backbones_section(result: Results) -> str:
    with_mixing, without = (
        cell_of(result, name, backbones.LARGE)["macs"]
        for name in ("Castling-ViT-S", "ViT-S, no mixing")
    )
    share = with_mixing / without - 1
    pictures = PICTURES.format(kind=kind_of(result))
    return pictures + table(result) + MIXING.format(share=share)


def precision_section(result: Results) -> str:
    text = table(result)
    if "auto" in result:
        text += AUTO.format(said=result["auto"])
    text += LIBRARIES
    for name, value in result["linear"].items():
        text += f"| {name} | {duration(value, 1e3, 1)} |\n"
    text += ACCURACY
    for name, row in result["detector"].items():
        cells = f"{row['bbox']:.3f} | {row['segm']:.3f} | {row['seconds']:.3f}"
        text += f"| {name} | {cells} |\n"
    if result["lacking"]:
        reasons = (f"{name} ({why})" for name, why in result["lacking"].items())
        text += LACKING.format(reasons="; ".join(reasons))
    return text


def detectors_section(result: Results) -> str:
    text = table(result) + PARTS
    for name, parts in result["parts"].items():
        keys = ("reading", "data_preprocessor", "backbone", "neck", "heads")
        keys = (*keys, "post_processing")
        times = " | ".join(f"{1e3 * parts[key]:,.0f}" for key in keys)
        text += f"| {name} | {times} | {parts['detections']} |\n"
    return text


SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "attention": (ATTENTION, attention_section),
    "backbones": (BACKBONES, backbones_section),
    "precision": (PRECISION, precision_section),
    "detectors": (DETECTORS, detectors_section),
    "runtimes": (
        runtimes.INTRODUCTION,
        lambda result: runtimes.section(result, table(result)),
    ),
    "training_steps": (TRAINING, lambda result: table(result)),
}
"""By benchmark what is said of all machines, and what of each."""


def targets(results: dict[str, dict[str, Any]]) -> list[Target]:
    """All targets, benchmark by benchmark."""
    return [
        target
        for name, result in results.items()
        for target in SCRIPTS[name].targets(result)
    ]


def table(result: dict[str, Any]) -> str:
    """The cells of a result as a table."""
    return HEADER + "".join(f"{line(cell)}\n" for cell in result["cells"])


def readme_with(machines: dict[str, Results], text: str) -> str:
    """The README's text with the backbones' speed between its two marks.

    Args:
        machines: The stored results of ``benchmarks/backbones.py`` by kind of machine.
        text: The README.
    """
    height, width = backbones.LARGE
    rows = [
        f"| backbone, {height}x{width} pixels | on | softmax, ms | castled and "
        "deployed, ms | times as fast |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, softmax in TWINS.items():
        for kind, result in machines.items():
            old, new = (median(result, n, backbones.LARGE) for n in (softmax, name))
            cells = f"{kind} | {1e3 * old:,.0f} | {1e3 * new:,.0f} | {old / new:.1f}"
            rows.append(f"| {name.removeprefix('Castling-')} | {cells} |")
    places = [
        f"{kind}: {{threads}} CPU threads, {{device}}, torch {{torch}}".format(
            **result["environment"]
        )
        for kind, result in machines.items()
    ]
    caption = (
        "Medians of forward passes in float32 with batch 1; weights are random. "
        f"{'; '.join(places)}.\n"
    )
    return replace_between(text, BEGIN, END, "\n".join([*rows, "", caption]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    paths = [p for script in SCRIPTS.values() for p in script.BENCHMARK.stored]
    try:
        machines = read(paths)
    except ValueError as error:
        parser.error(str(error))
    if not machines:
        parser.error(
            f"no result is stored: run {SCRIPTS['attention'].BENCHMARK.command}"
        )
    print(targets_table(machines))
    measured = {
        k: found["backbones"] for k, found in machines.items() if "backbones" in found
    }
    for kind, result in measured.items():
        speed_figures.plot_resolution(result, ASSETS / f"speed_resolution_{kind}.png")
        speed_figures.plot_macs(result, ASSETS / f"speed_macs_{kind}.png")
    if measured:
        write_text_atomically(README, readme_with(measured, README.read_text()))
    write_text_atomically(PAGE, page(machines))


if __name__ == "__main__":
    main()
