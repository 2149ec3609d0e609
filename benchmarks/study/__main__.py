"""The command line: ``python -m benchmarks.study TABLE``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from mmengine.logging import MMLogger

import benchmarks.study as study
from benchmarks.castle_and_distil import find_data
from benchmarks.study.fashion import Data, Trainer
from benchmarks.study.store import Run, Store
from benchmarks.study.variants import Recipe, table_runs
from mmcastling.engine import ConfigError, run_cli

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "study"
FASHION = ("a", "b", "c", "d")


def parse_args(options: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=study.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=FASHION)
    parser.add_argument("--data-root", type=Path, help="folder of the data")
    parser.add_argument(
        "--download", action="store_true", help="get what is missing in --data-root"
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
    for field in dataclasses.fields(Recipe):
        name = field.name.replace("_", "-")
        kind = type(field.default)
        parser.add_argument(
            f"--{name}", type=kind, default=field.default, help=f"({field.default})"
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
    """Run a table's missing runs."""
    args = parse_args(options)
    torch.set_num_threads(args.threads)
    MMLogger.get_current_instance().setLevel("WARNING")  # not each weight's start
    recipe, store = recipe_of(args), Store(args.out)
    runs = table_runs(args.table, recipe)
    store.check(runs)
    runs = part_of(runs, args.part)
    trainer = None
    for i, run in enumerate(runs, start=1):
        result = store.load(run)  # another process may have stored it meanwhile
        if result is None:
            if trainer is None:
                folder = find_data(args.data_root, args.download)
                data = Data(folder, recipe)
                trainer = Trainer(data, recipe, store, args.work_dir)
            result = trainer.carry_out(run)
        print(f"{i}/{len(runs)} {run}: {result['accuracy']:.2f}%", flush=True)


if __name__ == "__main__":
    run_cli(main)
