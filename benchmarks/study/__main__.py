"""The command line: ``python -m benchmarks.study TABLE``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from mmengine.logging import MMLogger

import benchmarks.study as study
from benchmarks.castle_and_distil import find_data
from benchmarks.study import nuclei, report, timing
from benchmarks.study.fashion import Data, Trainer
from benchmarks.study.nuclei import ITERATIONS
from benchmarks.study.store import Run, Store
from benchmarks.study.variants import Recipe, table_runs
from mmcastling.run import ConfigError, run_cli

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "study"
FASHION = ("a", "b", "c", "d")


def parse_args(options: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=study.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=(*FASHION, "nuclei", "time", "report"))
    parser.add_argument(
        "--data-root",
        type=Path,
        help="folder of the data: Fashion-MNIST's idx files, or the nuclei set",
    )
    parser.add_argument(
        "--download", action="store_true", help="get missing idx files in --data-root"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of results (%(default)s)"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs") / "study",
        help="folder of trained weights (%(default)s)",
    )
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="K/N",
        help="only every N-th run, beginning with the K-th: for N processes at a time",
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1)")
    parser.add_argument(
        "--iterations",
        type=int,
        default=ITERATIONS,
        help="of a detector's training (%(default)s)",
    )
    for field in dataclasses.fields(Recipe):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"of the classifiers ({field.default:g})",
        )
    return parser.parse_args(options)


def part_of(runs: list[Run], part: str) -> list[Run]:
    """The runs that ``--part`` names.

    Raises:
        ConfigError: If it is not ``K/N`` with K from 1 to N.
    """
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--part {part!r}: expected K/N with K from 1 to N, as 2/3")
    return runs[int(number) - 1 :: int(count)]


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the options give.

    Raises:
        ConfigError: If a value cannot work.
    """
    names = [field.name for field in dataclasses.fields(Recipe)]
    recipe = Recipe(**{name: getattr(args, name) for name in names})
    for name in names:
        value = getattr(recipe, name)
        if not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be above 0")
    if not recipe.warm_up < 1:
        raise ConfigError(f"--warm-up {recipe.warm_up} must be a fraction below 1")
    if recipe.train_images < recipe.batch_size:
        raise ConfigError(
            f"--train-images {recipe.train_images} is less than a batch of "
            f"{recipe.batch_size}: give more, or a smaller --batch-size"
        )
    return recipe


def main(options: list[str] | None = None) -> None:
    """Run a table's missing runs, time the attentions, or write the page."""
    args = parse_args(options)
    torch.set_num_threads(args.threads)
    MMLogger.get_current_instance().setLevel("WARNING")  # not each weight's start
    recipe, store = recipe_of(args), Store(args.out)
    if args.table == "report":
        report.write(store, recipe, args.iterations)
    elif args.table == "time":
        data = Data(find_data(args.data_root, args.download), recipe)
        timing.measure(data, recipe, args.out / "timing.json")
    elif args.table == "nuclei":
        if args.iterations < 4:
            raise ConfigError(
                f"--iterations {args.iterations} leaves no room for a schedule: give "
                "at least 4"
            )
        runs = nuclei.table_runs(args.iterations)
        root = str(args.data_root or nuclei.DATA_ROOT)
        run_all(runs, args.part, store, nuclei.Trainer(root, store))
    else:
        runs = table_runs(args.table, recipe)
        store.check(runs)  # before data is looked for
        folder = find_data(args.data_root, args.download)
        trainer = Trainer(Data(folder, recipe), recipe, store, args.work_dir)
        run_all(runs, args.part, store, trainer)


def run_all(
    runs: list[Run], part: str, store: Store, trainer: Trainer | nuclei.Trainer
) -> None:
    """Carry out what is not stored yet."""
    store.check(runs)
    runs = part_of(runs, part)
    for i, run in enumerate(runs, start=1):
        result = store.load(run)  # another process may have stored it meanwhile
        if result is None:
            result = trainer.carry_out(run)
        print(f"{i}/{len(runs)} {run}: {trainer.headline(result)}", flush=True)


if __name__ == "__main__":
    run_cli(main)
