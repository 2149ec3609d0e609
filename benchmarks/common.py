"""What the speed benchmarks share: contenders in turns, peak memory, stored results."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mmdet
import mmpretrain
import timm
import torch
from torch import Tensor, nn

from mmcastling.analysis import count_macs, paired_seconds
from mmcastling.analysis.machine import PeakMemory, environment, instruction_set
from mmcastling.checkpoint import write_json_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is timed: a module and its input at a size ``(H, W)``.

    Args:
        build: Makes the module.
        make_input: Makes the positional arguments of a pass, from the size.
        sizes: The sizes it is measured at, None for all.
        make_pass: Makes the pass from module and input, None for a forward pass in
            inference mode.
        count: Counts the MACs of the module, None for those of a forward pass.
    """

    build: Callable[[], nn.Module]
    make_input: Callable[[Size], tuple[Any, ...]]
    sizes: tuple[Size, ...] | None = None
    make_pass: Callable[..., Callable[[], Any]] | None = None
    count: Callable[[nn.Module], int] | None = None

    def prepare(self, size: Size, device: str) -> tuple[Any, ...]:
        """The module, with seeded weights, and its arguments on a device."""
        torch.manual_seed(0)
        inputs = self.make_input(size)
        moved = (x.to(device) if isinstance(x, Tensor) else x for x in inputs)
        return self.build().to(device), *moved

    def ready(self, size: Size, device: str) -> Callable[[], Any]:
        """One pass at a size."""
        module, *inputs = self.prepare(size, device)
        if self.make_pass is not None:
            return self.make_pass(module, *inputs)
        module.eval()  # which returns nothing for some of mmdet's
        return functools.partial(infer, module, *inputs)


@torch.inference_mode()
def infer(module: nn.Module, *inputs: Any) -> Any:
    """A forward pass that keeps nothing for a backward pass."""
    return module(*inputs)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Contenders, the sizes at which they meet, and how often.

    Args:
        name: Name of the script and of its stored result.
        contenders: By name.
        repeats: Rounds by size.
        extra: Measures what else the result holds, in the same process.
    """

    name: str
    contenders: dict[str, Contender]
    repeats: dict[Size, int]
    extra: Callable[[str], dict[str, Any]] = lambda device: {}

    @property
    def stored(self) -> list[Path]:
        """The complete results that are kept, one for each kind of machine."""
        return sorted((RESULTS / self.name).glob("*.json"))

    @property
    def command(self) -> str:
        """What anyone runs to repeat it."""
        return f"python benchmarks/{self.name}.py"

    def at(self, size: Size, names: Sequence[str]) -> list[str]:
        """The contenders among ``names`` that are measured at a size."""
        return [
            name
            for name in names
            if self.contenders[name].sizes is None
            or size in self.contenders[name].sizes
        ]

    def measure(
        self, names: Sequence[str], device: str, unfinished: Path | None = None
    ) -> dict[str, Any]:
        """All sizes, contenders in turns; prints a line per contender and size.

        Args:
            names: The contenders.
            device: Where they run.
            unfinished: Where sizes that are done are noted, so that a run that was
                killed goes on after them. Defaults to None.
        """
        noted: dict[str, Any] = dict(environment=versions(device), cells=[])
        if unfinished is not None and unfinished.is_file():
            earlier = load(unfinished)
            noted = earlier if earlier["environment"] == versions(device) else noted
        cells = noted["cells"]

        def note() -> None:
            if unfinished is not None:
                write_json_atomically(unfinished, noted)

        for size, repeats in self.repeats.items():
            present = self.at(size, names)
            if any(tuple(cell["size"]) == size for cell in cells):
                print(f"{size[0]}x{size[1]}: measured before, {unfinished}")
                continue
            passes = {
                name: self.contenders[name].ready(size, device) for name in present
            }
            seconds = paired_seconds(passes, repeats) if passes else {}
            del passes
            for name in present:
                cell = dict(
                    contender=name,
                    size=list(size),
                    rounds=repeats,
                    seconds=spread(seconds[name]),
                    macs=self._macs(name, size),
                )
                cells.append(cell)
                milliseconds = duration(cell["seconds"], 1e3, 1)
                print(f"{size[0]}x{size[1]} {name}: {milliseconds} ms", flush=True)
            note()
        if "extra" not in noted:
            noted["extra"] = self.extra(device)
            note()
        # Nothing is timed any more, so that processes may share the machine.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            peaks = pool.map(
                lambda cell: self._memory_in_fresh_process(
                    cell["contender"], tuple(cell["size"]), device
                ),
                cells,
            )
            for cell, peak in zip(cells, peaks, strict=True):
                cell["memory"] = peak
                print(line(cell), flush=True)
        return dict(
            command=self.command,
            environment=versions(device),
            cells=cells,
            **noted["extra"],
        )

    def _macs(self, name: str, size: Size) -> int:
        contender = self.contenders[name]
        module, *inputs = contender.prepare(size, "cpu")
        if contender.count is not None:
            return contender.count(module)
        return count_macs(module, tuple(inputs)).macs

    def _memory_in_fresh_process(self, name: str, size: Size, device: str) -> int:
        script = ROOT / "benchmarks" / f"{self.name}.py"
        cell = [name, *map(str, size), device, str(torch.get_num_threads())]
        command = [sys.executable, str(script), "--memory-of", *cell]
        return int(subprocess.check_output(command, text=True).split()[-1])

    def memory(self, name: str, size: Size, device: str) -> int:
        """Peak bytes of one pass beyond weights and input, in this process."""
        run = self.contenders[name].ready(size, device)
        torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
        with PeakMemory(device) as peak:
            run()
        return peak.bytes

    def main(self, doc: str) -> None:
        """Run the script: measure, print and store."""
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--only", nargs="+", metavar="NAME", help=f"of {list(self.contenders)}"
        )
        parser.add_argument("--json", type=Path, metavar="FILE", help="result")
        parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
        parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
        parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
        args = parser.parse_args()
        if args.memory_of:
            name, height, width, device, threads = args.memory_of
            torch.set_num_threads(int(threads))
            print(self.memory(name, (int(height), int(width)), device))
            return
        try:
            kind = instruction_set(args.device)
            torch.empty(1, device=args.device)
        except (RuntimeError, AssertionError) as error:
            parser.error(
                f"--device {args.device}: torch finds no such device here "
                f"({str(error).splitlines()[0]}): choose cpu, or another machine"
            )
        path = args.json or RESULTS / self.name / f"{kind}.json"
        names = args.only or list(self.contenders)
        if unknown := [name for name in names if name not in self.contenders]:
            parser.error(
                f"--only: {unknown} are not contenders: choose among "
                f"{list(self.contenders)}"
            )
        if args.only and args.json is None:
            parser.error(
                f"--only leaves contenders out, and {self.name}/{path.name} holds "
                "complete results: name another file with --json"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        for key, value in versions(args.device).items():
            print(f"{key:12} {value}")
        unfinished = path.with_suffix(".unfinished")
        result = self.measure(names, args.device, None if args.only else unfinished)
        write_json_atomically(path, result)
        unfinished.unlink(missing_ok=True)
        print(f"wrote {path}")


def versions(device: str) -> dict[str, Any]:
    """The machine, and the versions of all that is measured."""
    return dict(
        environment(device),
        mmdet=mmdet.__version__,
        mmpretrain=mmpretrain.__version__,
        timm=timm.__version__,
    )


def image(size: Size) -> tuple[Tensor]:
    """A seeded image ``(1, 3, H, W)`` of noise."""
    return (torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)),)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict(median=values[0], low=values[0], high=values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return dict(median=median, low=low, high=high)


def duration(value: dict[str, float], factor: float, digits: int) -> str:
    """``median (low to high)`` in other units."""
    low, median, high = (
        f"{value[key] * factor:,.{digits}f}" for key in ("low", "median", "high")
    )
    return f"{median} ({low} to {high})"


def line(cell: dict[str, Any]) -> str:
    """A measured contender in a row of a table."""
    height, width = cell["size"]
    return (
        f"| {height}x{width} | {cell['contender']} "
        f"| {duration(cell['seconds'], 1e3, 1)} | {cell['memory'] / 1e6:,.0f} "
        f"| {cell['macs'] / 1e9:,.2f} |"
    )


def median(result: dict[str, Any], name: str, size: Size) -> float:
    """Median seconds of a contender at a size."""
    return cell_of(result, name, size)["seconds"]["median"]


def cell_of(result: dict[str, Any], name: str, size: Size) -> dict[str, Any]:
    """What was measured of a contender at a size."""
    for cell in result["cells"]:
        if cell["contender"] == name and tuple(cell["size"]) == size:
            return cell
    raise KeyError(f"no {name} at {size[0]}x{size[1]} in the result")


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound that was set before measuring.

    Args:
        claim: What is bounded.
        measured: The figure.
        limit: The bound.
        least: Whether the figure must not be below the bound; else not above.
    """

    claim: str
    measured: float
    limit: float
    least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the figure keeps to the bound."""
        return (self.measured >= self.limit) == self.least or (
            self.measured == self.limit
        )

    @property
    def text(self) -> str:
        """The claim with its bound."""
        return f"{self.claim}, at {'least' if self.least else 'most'} {self.limit:g}"

    def __str__(self) -> str:
        reached = "yes" if self.reached else "**no**"
        return f"| {self.text} | {self.measured:.3g} | {reached} |"


def kind_of(result: dict[str, Any]) -> str:
    """The kind of machine that a result was measured on, as a file is named by it.

    See :func:`mmcastling.analysis.machine.instruction_set`.
    """
    name = result["environment"]["device"].rpartition(" with ")[2]
    return re.sub(r"\W+", "_", name).lower()


def load(path: Path) -> dict[str, Any]:
    """A stored result."""
    return json.loads(path.read_text())
