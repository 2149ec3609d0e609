"""Castle DINOv2-S and align it without labels: how much of its features is kept.

python tools/data/fetch_dinov2_s.py data/dinov2_s
python benchmarks/align_dinov2.py data/dinov2_s PICTURES          # hours; resumable
python benchmarks/align_dinov2.py data/dinov2_s PICTURES --rows all two-kept
python benchmarks/align_dinov2.py --docs                          # the page's tables

Every tenth picture is held out, and all features are compared on these. ``--fashion``
names the folder of Fashion-MNIST for the nearest neighbours (Debian's package
``dataset-fashion-mnist`` has it).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from fashion_data import TEST, TRAIN, find_data, read
from marked import replace_between
from torch import Tensor, nn

from mmcastling import align, castle, set_mask, switch_to_deploy
from mmcastling.alignment import PictureBatches, attention_errors
from mmcastling.alignment.aligning import STATE_FILE
from mmcastling.analysis import paired_medians
from mmcastling.analysis.data_sample import whole_pass
from mmcastling.analysis.machine import environment
from mmcastling.castle import RECOMMENDED, WITHOUT_GRID
from mmcastling.checkpoint import (
    load_checkpoint,
    write_json_atomically,
    write_text_atomically,
)
from mmcastling.decay import MaskDecay
from mmcastling.deploy import may_gain
from mmcastling.files import temporary_folder
from mmcastling.models import CastlingViT
from mmcastling.run import ConfigError, run_cli
from mmcastling.weights.importing import import_checkpoint

STORED = ROOT / "benchmarks" / "results" / "align_dinov2"
PAGE = ROOT / "docs" / "align.md"
BEGIN, END = "<!-- dinov2-table -->\n", "<!-- /dinov2-table -->"
FORMS_BEGIN, FORMS_END = "<!-- form-table -->\n", "<!-- /form-table -->"
SIZES = ((224, 224), (448, 448), (336, 560))
MEAN, STD = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
NEIGHBOURS, FASHION_SIDE = 20, 112

BACKBONE = dict(arch="small", img_size=518, patch_size=14, layer_scale_init_value=1e-5)
GRID = RECOMMENDED["local_conv"]
RECIPE = dict(steps=(300, 0), learning_rates=(3e-4, 4e-5), batch_size=4)
SHORT = dict(RECIPE, steps=(100, 0))
LEARNED = {**RECOMMENDED, **WITHOUT_GRID}
NO_BRANCH, BRANCH = dict(start=1.0), dict(start="4/N")
# What each row castles with, what it keeps, and how it is aligned.
ROWS: dict[str, dict[str, Any]] = {
    "softmax": dict(title="softmax (the teacher)"),
    "released": dict(
        title="castled in the released form, not aligned",
        attention=dict(form="released", center_keys=False, local_conv=None),
    ),
    "untrained": dict(
        title="castled in the learned form, not aligned", attention=RECOMMENDED
    ),
    "all": dict(
        title="all 12 castled, aligned",
        attention=RECOMMENDED,
        mask=NO_BRANCH,
        **RECIPE,
    ),
    "two-stages": dict(
        title="the same, 150 steps and 300 of the second stage",
        attention=RECOMMENDED,
        mask=NO_BRANCH,
        **dict(RECIPE, steps=(150, 300)),
    ),
    "all-branch": dict(
        title="all 12 castled, aligned with the decaying branch",
        attention=RECOMMENDED,
        mask=BRANCH,
        **RECIPE,
    ),
    "two-kept": dict(
        title="two blocks kept softmax, aligned",
        attention=RECOMMENDED,
        keep=2,
        mask=NO_BRANCH,
        **RECIPE,
    ),
}
# The first stage alone, for what is compared in short.
SHORT_ROWS: dict[str, dict[str, Any]] = {
    f"short-{name}": dict(title=title, attention=attention, mask=mask, **SHORT)
    for name, title, attention, mask in (
        ("recommended", "what `align` does", RECOMMENDED, NO_BRANCH),
        *(
            (
                f"landmarks-{count}",
                f"{count}x{count} landmarks",
                dict(RECOMMENDED, landmarks=count),
                NO_BRANCH,
            )
            for count in (4, 6)
        ),
        ("learned", 'form="learned", keys centred', LEARNED, NO_BRANCH),
        ("branch", "with the decaying branch", RECOMMENDED, BRANCH),
        (
            "released",
            'form="released", keys not centred',
            dict(LEARNED, form="released", center_keys=False),
            NO_BRANCH,
        ),
        (
            "no-conv",
            "without the convolution",
            dict(RECOMMENDED, local_conv=None),
            NO_BRANCH,
        ),
        (
            "conv5",
            "a convolution of 5x5",
            dict(RECOMMENDED, local_conv=dict(GRID, kernel_size=5)),
            NO_BRANCH,
        ),
    )
}
ALL_ROWS = ROWS | SHORT_ROWS
TIMES = "times"  # the milliseconds of the row "all", with nothing beside it


def features(model: nn.Module, images: Tensor) -> Tensor:
    """The last layer's tokens ``(B, 1 + N, C)``, normalised."""
    return model(images)[-1]


def imported_weights(folder: Path) -> dict[str, Tensor]:
    """DINOv2-S with the names of our backbone."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ConfigError(
            f"{weights} does not exist: python tools/data/fetch_dinov2_s.py {folder}"
        )
    with temporary_folder(folder / "imported.pth") as scratch:
        path = scratch / "imported.pth"
        import_checkpoint(weights, path, "vit", "small")
        state = load_checkpoint(path)["state_dict"]
    return {name.removeprefix("backbone."): value for name, value in state.items()}


def teacher_of(folder: Path) -> nn.Module:
    """DINOv2-S with its weights, as our softmax network."""
    attention = dict(type="softmax")
    model = CastlingViT(**BACKBONE, attention=attention, out_type="raw")
    model.load_state_dict(imported_weights(folder))
    return model.eval()


def pictures_of(
    folder: Path, sizes: Any = SIZES[:1], batch_size: int = 8
) -> tuple[PictureBatches, ...]:
    """Pictures to train on, and those that are held out."""
    return PictureBatches(folder, sizes, batch_size, MEAN, STD).split(0.1)


@torch.no_grad()
def compare(student: nn.Module, teacher: nn.Module, held_out: Any) -> dict[str, Any]:
    """Cosines of patch and class features on held-out pictures, by size."""
    found, held_out = {}, copy.copy(held_out)
    held_out.batch_size = 4
    for size, count in zip(SIZES, (20, 8, 8), strict=True):
        patches, classes = [], []
        for step in range(count):
            x = held_out.batch(step, size)
            cosine = nn.functional.cosine_similarity(
                features(student, x), features(teacher, x), dim=-1
            )
            patches.append(cosine[:, 1:].mean().item())
            classes.append(cosine[:, 0].mean().item())
        name = f"{size[0]}x{size[1]}"
        found[name] = dict(patch=sum(patches) / count, cls=sum(classes) / count)
    return found


@torch.no_grad()
def nearest_neighbours(model: nn.Module, data: Path, train: int, test: int) -> float:
    """Accuracy in percent of 20 neighbours by the class token on Fashion-MNIST."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def embed(pictures: Tensor) -> Tensor:
        found = []
        for images in pictures.split(32):
            x = (images.float().expand(-1, 3, -1, -1) - mean) / std
            side = (FASHION_SIDE, FASHION_SIDE)
            x = nn.functional.interpolate(x, side, mode="bicubic")
            found.append(nn.functional.normalize(features(model, x)[:, 0], dim=1))
        return torch.cat(found)

    known, known_labels = read(data, TRAIN, train)
    asked, labels = read(data, TEST, test)
    near = (embed(asked) @ embed(known).T).topk(NEIGHBOURS)
    votes = torch.zeros(test, 10).scatter_add_(
        1, known_labels[near.indices], near.values
    )
    return 100.0 * (votes.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def milliseconds(
    teacher: nn.Module,
    student: nn.Module,
    sizes: Sequence[tuple[int, int]],
    channels: int = 3,
) -> dict[str, list[float]]:
    """Medians of softmax and of the castled network, deployed, by size."""
    set_mask(student, 1.0)
    models, found = dict(softmax=teacher, castled=switch_to_deploy(student)), {}
    for model in models.values():
        model.eval()  # mmdet's backbones return nothing
    for height, width in sizes:
        run = whole_pass(torch.randn(1, channels, height, width))
        passes = {name: functools.partial(run, model) for name, model in models.items()}
        with torch.inference_mode():
            seconds = paired_medians(passes, repeats=5)
        found[f"{height}x{width}"] = [1000 * s for s in seconds.values()]
    return found


def store_times(
    path: Path,
    teacher: nn.Module,
    student: nn.Module,
    sizes: Sequence[tuple[int, int]],
    channels: int = 3,
) -> None:
    """Measure :func:`milliseconds`, and write them to a file."""
    times = milliseconds(teacher, student, sizes, channels)
    write_json_atomically(
        path, dict(milliseconds=times, environment=environment("cpu"))
    )
    print(path.stem, json.dumps(times))


def times_text(path: Path) -> str:
    """What :func:`store_times` has written, in a sentence's second half."""
    result = json.loads(path.read_text())
    times = "; ".join(
        f"{size} {' and '.join(f'{t:,.{0 if t >= 10 else 1}f}' for t in pair)}"
        for size, pair in result["milliseconds"].items()
    )
    machine = result["environment"]
    return f"{times} (float32, {machine['threads']} threads, {machine['device']})"


def carry_out(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: castle, align where it says so, deploy, compare."""
    row, teacher = ALL_ROWS[name], teacher_of(args.weights)
    options = {key: row[key] for key in ("sizes", "batch_size") if key in row}
    batches, held_out = pictures_of(args.pictures, **options)
    settings = {**row, "amp": may_gain("bf16")}
    result: dict[str, Any] = dict(settings=settings)
    started, student = time.process_time(), copy.deepcopy(teacher)
    goes_on = (args.work_dir / name / STATE_FILE).is_file()
    if "attention" in row:
        keep = dict(keep="auto", budget=row["keep"]) if "keep" in row else {}
        scanned = [batches.batch(0, SIZES[0])] if keep else ()
        student, report = castle(
            student, images=scanned, return_report=True, **keep, **row["attention"]
        )
        result["kept"] = [n for n, why in report.left_alone.items() if why == "kept"]
    if "steps" in row:
        align(
            student,
            teacher,
            batches,
            steps=row["steps"],
            learning_rates=row["learning_rates"],
            mask=MaskDecay(**row["mask"]),
            features=features,
            folder=args.work_dir / name,
        )
    if not goes_on:  # of which only the last sitting is known
        result["cpu_seconds"] = time.process_time() - started
    if "attention" in row:
        set_mask(student, 1.0)
        student = switch_to_deploy(student)
        result["errors"] = attention_errors(
            student, teacher, [held_out.batch(0, SIZES[0])], features
        )
    result["cosine"] = compare(student, teacher, held_out)
    if args.fashion is not None and name in ROWS:
        result["knn"] = nearest_neighbours(student, args.fashion, 2000, 1000)
    return dict(result, environment=environment("cpu"))


def table(rows: dict[str, dict[str, Any]], knn: bool) -> tuple[str, dict[str, Any]]:
    """The stored ones of some rows in Markdown, and their results."""
    lines = [
        "| DINOv2-S | patch cosine 224 | 448 | 336x560 | class cosine 224 |",
        "| --- | --- | --- | --- | --- |",
    ]
    if knn:
        lines = [lines[0] + " k-NN % | core minutes |", lines[1] + " --- | --- |"]
    stored = {}
    for name, row in rows.items():
        if not (STORED / f"{name}.json").is_file():
            continue
        stored[name] = found = json.loads((STORED / f"{name}.json").read_text())
        cells = [f"{found['cosine'][f'{h}x{w}']['patch']:.3f}" for h, w in SIZES]
        cells.append(f"{found['cosine']['224x224']['cls']:.3f}")
        if knn:
            cells.append(f"{found['knn']:.1f}" if "knn" in found else "")
            seconds = found.get("cpu_seconds") if "steps" in row else None
            cells.append("" if seconds is None else f"{seconds / 60:.0f}")
        title = row["title"]
        if kept := found.get("kept"):
            title += f" ({', '.join(kept)})"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", stored


def write_page() -> None:
    """Put the tables of stored rows into the page."""
    text, stored = table(ROWS, knn=True)
    if measured := stored.get("all"):
        settings = measured["settings"]
        steps, batch = settings["steps"], settings["batch_size"]
        machine = measured["environment"]
        text += (
            f"\nWhere nothing else is said: {steps[0]} steps of the first stage and "
            f"{steps[1]} of the second, {batch} pictures of 224x224 each, "
            f"{'bfloat16' if settings['amp'] else 'float32'}, one thread "
            f"({machine['device']}, torch {machine['torch']}), one seed. Cosines are "
            "means of 80 pictures at 224x224, of 32 at the others. k-NN: 20 neighbours "
            "by the class token, 2,000 training and 1,000 test images of Fashion-MNIST "
            "at 112x112.\n"
        )
    if (STORED / f"{TIMES}.json").is_file():
        times = times_text(STORED / f"{TIMES}.json")
        text += f"\nMilliseconds of a picture, softmax and castled: {times}.\n"
    page = replace_between(PAGE.read_text(), BEGIN, END, text)
    text, stored = table(SHORT_ROWS, knn=False)
    page = replace_between(
        page, FORMS_BEGIN, FORMS_END, text if stored else "No row is stored yet.\n"
    )
    write_text_atomically(PAGE, page)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("weights", type=Path, nargs="?", help="folder of fetch_dinov2_s.py")
    add("pictures", type=Path, nargs="?", help="folder of pictures")
    rows = [*ALL_ROWS, TIMES]
    add("--rows", nargs="+", choices=rows, default=rows, metavar="ROW")
    add("--fashion", type=Path, help="folder of Fashion-MNIST")
    add("--work-dir", type=Path, default=Path("work_dirs/align_dinov2"))
    add("--docs", action="store_true", help="only write the page's table")
    args = parser.parse_args()
    if not args.docs and args.pictures is None:
        parser.error("give WEIGHTS and PICTURES, or --docs")
    return args


def main() -> None:
    args = parse_args()
    if args.docs:
        write_page()
        return
    if args.fashion is not None:
        args.fashion = find_data(args.fashion)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mmcastling").setLevel(logging.INFO)
    STORED.mkdir(parents=True, exist_ok=True)
    for name in args.rows:
        path = STORED / f"{name}.json"
        if path.is_file():
            print(f"{name}: stored already")
            continue
        if name == TIMES:
            teacher = teacher_of(args.weights)
            student = castle(copy.deepcopy(teacher), **RECOMMENDED)
            store_times(path, teacher, student, (*SIZES, (896, 896)))
            continue
        result = carry_out(name, args)
        print(name, json.dumps(result["cosine"]), result.get("knn"))
        write_json_atomically(path, result)


if __name__ == "__main__":
    run_cli(main)
