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
import matplotlib
import precision
import runtimes
import training_steps
from common import ROOT, Benchmark, Target, cell_of, duration, line, load, median
from matplotlib.figure import Figure

from mmcastling.checkpoint import write_text_atomically

matplotlib.use("Agg")

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

BEGIN, END = "<!-- speed-table -->\n", "<!-- /speed-table -->"
TWINS = {
    "Castling-ViT-S": "ViT-S, softmax",
    "Castling-MViTv2-T": "MViTv2-T, softmax",
    "Castling-LeViT-256": "LeViT-256, softmax",
}

PREAMBLE = """\
# Deployed speed

Made by `python benchmarks/report.py` from the results that these commands stored in
`benchmarks/results`, each in one run on a CPU ({device}),
{threads} threads, torch {torch}, mmdet {mmdet}, mmpretrain {mmpretrain}, timm {timm},
Python {python}, float32, batch 1, default allocator:

{commands}
{missing}
Within a script contenders take turns, so that a machine that grows slower hits all
alike; another machine gives other times. Milliseconds are medians (quartiles) of
forward passes in inference mode, weights are random. Memory is the peak beyond weights
and input, of a first pass in a fresh process. Castled models are deployed. `--device
cuda` runs the same scripts with synchronised clocks; that has not been tried.

## Targets

| | measured | reached |
| --- | --- | --- |
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
alone, the floor for any attention between them; *released* the same function in the
authors' order of operations in eager mode, between torch's linear layers. All others
have the linear layers that deployment makes, which oneDNN computes in one pass.

"""

ROOFLINE = """
What bounds it: the projections take {share:.0%} of castling's time at 4,200 tokens.
They are matrix products, which ran at these GFLOP/s in the same run, in torch's linear
layer and in the one that deployment makes of it:

| product | GFLOP/s |
| --- | --- |
"""

BACKBONES = """
## Backbones

In the form that a detector takes, all levels of features. *no mixing* is the plain
network whose attentions are their projections alone. It and the softmax twins have the
linear layers that deployment makes, too.

![Latency and memory against resolution](assets/speed_resolution.png)
![Latency against MACs at 800x1344](assets/speed_macs.png)

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
attention stay float32. What bounds both: of float32's time only the products of layers
shrink, while norms, sums, activations and conversions between formats do not.

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

LACKING = "\nThis machine has no instructions for {names}, which were not measured.\n"

DETECTORS = """
## Detectors

One image of noise through `test_step`. Weights are random, with the first class made
likely, so that there are as many boxes as a detector may return.

"""

PARTS = """
Where the time goes, in ms, in further passes by turns; *heads* is the rest, with
proposals, suppression and masks:

| | preparing | backbone | neck | heads | detections |
| --- | --- | --- | --- | --- | --- |
"""

TRAINING = """
## Training steps

512x512, forward, backward and AdamW. Memory includes gradients and the optimizer's
state; GMACs are those of a forward pass. What the auxiliary branch costs at other sizes
and thresholds: [auxiliary_branch.md](auxiliary_branch.md).

"""


def read(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Stored results by benchmark, checked to belong together.

    Args:
        paths: Result files, named as their benchmarks.

    Raises:
        ValueError: If a file is not of a known benchmark, does not exist, is not
            complete, or was made on another machine or with other versions.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path.stem not in SCRIPTS:
            raise ValueError(
                f"{path} is not the result of a known benchmark: expected a name among "
                f"{[f'{name}.json' for name in SCRIPTS]}"
            )
        benchmark = SCRIPTS[path.stem].BENCHMARK
        if not path.exists():
            raise ValueError(f"{path} does not exist: run {benchmark.command}")
        result = results[path.stem] = load(path)
        _check_complete(benchmark, result, path)
        first, *_ = results
        for key, value in results[first]["environment"].items():
            if (other := result["environment"].get(key)) != value:
                raise ValueError(
                    f"{path} was measured with {key} {other!r}, {first}.json with "
                    f"{value!r}: one report is of one machine and its versions; run "
                    f"{benchmark.command} there again"
                )
    return results


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


def page(results: dict[str, Results]) -> str:
    """The page in Markdown: a section for each benchmark whose result is stored."""
    first = next(iter(results.values()))
    commands = "\n".join(f"- `{result['command']}`" for result in results.values())
    absent = [s.BENCHMARK.command for name, s in SCRIPTS.items() if name not in results]
    missing = MISSING.format(", ".join(f"`{c}`" for c in absent)) if absent else ""
    text = PREAMBLE.format(commands=commands, missing=missing, **first["environment"])
    text += "".join(f"{target}\n" for target in targets(results))
    return text + "".join(SECTIONS[name](results[name]) for name in results)


def attention_section(result: Results) -> str:
    floor, whole = (
        median(result, name, (50, 84)) for name in ("projections", "castling")
    )
    text = ATTENTION + table(result) + ROOFLINE.format(share=floor / whole)
    for name, value in result["gemm"].items():
        text += f"| {name} | {value['median']:,.0f} |\n"
    return text


def backbones_section(result: Results) -> str:
    with_mixing, without = (
        cell_of(result, name, backbones.LARGE)["macs"]
        for name in ("Castling-ViT-S", "ViT-S, no mixing")
    )
    share = with_mixing / without - 1
    return BACKBONES + table(result) + MIXING.format(share=share)


def precision_section(result: Results) -> str:
    text = PRECISION + table(result) + LIBRARIES
    for name, value in result["linear"].items():
        text += f"| {name} | {duration(value, 1e3, 1)} |\n"
    text += ACCURACY
    for name, row in result["detector"].items():
        cells = f"{row['bbox']:.3f} | {row['segm']:.3f} | {row['seconds']:.3f}"
        text += f"| {name} | {cells} |\n"
    if result["lacking"]:
        text += LACKING.format(names=" and ".join(result["lacking"]))
    return text


def detectors_section(result: Results) -> str:
    text = DETECTORS + table(result) + PARTS
    for name, parts in result["parts"].items():
        keys = ("data_preprocessor", "backbone", "neck", "heads")
        times = " | ".join(f"{1e3 * parts[key]:,.0f}" for key in keys)
        text += f"| {name} | {times} | {parts['detections']} |\n"
    return text


SECTIONS: dict[str, Callable[[Results], str]] = {
    "attention": attention_section,
    "backbones": backbones_section,
    "precision": precision_section,
    "detectors": detectors_section,
    "runtimes": lambda result: runtimes.section(result, table(result)),
    "training_steps": lambda result: TRAINING + table(result),
}


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


def readme_with(result: dict[str, Any], text: str) -> str:
    """The README's text with the backbones' speed between its two marks.

    Args:
        result: The stored result of ``benchmarks/backbones.py``.
        text: The README.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    height, width = backbones.LARGE
    rows = [
        f"| backbone, {height}x{width} pixels | softmax, ms | castled and deployed, ms "
        "| times as fast |",
        "| --- | --- | --- | --- |",
    ]
    for name, softmax in TWINS.items():
        old, new = (median(result, n, backbones.LARGE) for n in (softmax, name))
        model = name.removeprefix("Castling-")
        rows.append(
            f"| {model} | {1e3 * old:,.0f} | {1e3 * new:,.0f} | {old / new:.1f} |"
        )
    place = result["environment"]
    caption = (
        f"Medians of forward passes in float32 with batch 1 on {place['threads']} CPU "
        f"threads ({place['device']}), torch {place['torch']}; weights are "
        "random.\n"
    )
    return before + BEGIN + "\n".join([*rows, "", caption]) + END + after


def plot_resolution(result: dict[str, Any], path: Path) -> None:
    """Latency and memory of every backbone over the image's pixels."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(cell["contender"] for cell in result["cells"]))
    for index, name in enumerate(names):
        cells = [cell for cell in result["cells"] if cell["contender"] == name]
        pixels = [cell["size"][0] * cell["size"][1] for cell in cells]
        style = dict(marker="o", color=matplotlib.colormaps["tab20"](index), label=name)
        if name.startswith("Castling"):
            style.update(linewidth=2.5)
        axes[0].plot(pixels, [1e3 * c["seconds"]["median"] for c in cells], **style)
        axes[1].plot(pixels, [c["memory"] / 1e6 for c in cells], **style)
    sizes = sorted({tuple(cell["size"]) for cell in result["cells"]})
    for axis, title in zip(axes, ("latency, ms", "peak memory, MB"), strict=True):
        axis.set(title=title, xscale="log", yscale="log", xlabel="image")
        axis.set_xticks([h * w for h, w in sizes], [f"{h}x{w}" for h, w in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)


def plot_macs(result: dict[str, Any], path: Path) -> None:
    """Latency over MACs at the largest size, a point per backbone."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for cell in result["cells"]:
        if tuple(cell["size"]) != backbones.LARGE:
            continue
        castled = cell["contender"].startswith("Castling")
        point = cell["macs"] / 1e9, 1e3 * cell["seconds"]["median"]
        axis.scatter(*point, color="tab:red" if castled else "tab:gray", zorder=3)
        # Ours and the softmax twins have neighbours on the right.
        left = castled or cell["contender"].endswith("softmax")
        axis.annotate(
            cell["contender"],
            point,
            (-6 if left else 6, -3),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
        )
    height, width = backbones.LARGE
    axis.set(xscale="log", yscale="log", title=f"{height}x{width}")
    axis.set(xlabel="GMACs", ylabel="latency, ms")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    paths = [script.BENCHMARK.stored for script in SCRIPTS.values()]
    try:
        results = read([path for path in paths if path.exists()])
    except ValueError as error:
        parser.error(str(error))
    if not results:
        parser.error(
            f"no result is stored: run {SCRIPTS['attention'].BENCHMARK.command}"
        )
    for target in targets(results):
        print(target)
    if "backbones" in results:
        plot_resolution(results["backbones"], ASSETS / "speed_resolution.png")
        plot_macs(results["backbones"], ASSETS / "speed_macs.png")
        text = readme_with(results["backbones"], README.read_text())
        write_text_atomically(README, text)
    write_text_atomically(PAGE, page(results))


if __name__ == "__main__":
    main()
