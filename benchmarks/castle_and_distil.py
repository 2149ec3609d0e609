"""Castle a softmax ViT on Fashion-MNIST, finetune it with and without a teacher.

For every seed: train a small softmax vision transformer; copy its weights into the same
network with castling attention; finetune that briefly while its masks decay, once with
labels alone and once with its softmax self as teacher; prune it. As a control the
softmax network is finetuned alike. All finetunings begin with the same weights and see
the same batches. All accuracies are on the full test set.

python benchmarks/castle_and_distil.py           # train (5 to 15 minutes) and store
python benchmarks/castle_and_distil.py --docs    # write the page's table from it

Needs Fashion-MNIST as idx files (``train-images-idx3-ubyte.gz`` and so on, compressed
or not): Debian's package ``dataset-fashion-mnist`` has them, ``--download`` gets them.
"""

import argparse
import copy
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from marked import replace_between
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.datasets import FashionMNIST
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from mmcastling.analysis.machine import environment
from mmcastling.checkpoint import (
    load_checkpoint,
    save_atomically,
    write_json_atomically,
    write_text_atomically,
)
from mmcastling.run import ConfigError, run_cli
from mmcastling.verbs import switch_to_deploy

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "benchmarks" / "results" / "castle_and_distil.json"
PAGE = ROOT / "docs" / "distillation.md"
BEGIN, END = "<!-- castle-and-distil -->\n", "<!-- /castle-and-distil -->"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
BATCH_SIZE = 128

PREPROCESSOR = dict(
    type="mmpretrain.ClsDataPreprocessor", num_classes=10, mean=[72.94], std=[90.02]
)
# 28x28 pixels in patches of 4: 49 tokens and a class token.
BACKBONE = dict(
    type="mmcastling.CastlingViT",
    arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128),
    img_size=28,
    patch_size=4,
    in_channels=1,
)
SOFTMAX = dict(
    type="mmpretrain.ImageClassifier",
    data_preprocessor=PREPROCESSOR,
    backbone=dict(BACKBONE, attention=dict(type="softmax")),
    head=dict(
        type="mmpretrain.VisionTransformerClsHead", num_classes=10, in_channels=64
    ),
)
START = "4/N"  # a trained attention is sharp: a few pairs exceed four times uniform
CASTLED = dict(
    SOFTMAX,
    backbone=dict(
        BACKBONE,
        attention=dict(type="castling", local_conv="token", mask_threshold=START),
    ),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, help="folder of the idx files")
    parser.add_argument(
        "--download", action="store_true", help="get what is missing in --data-root"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="of the softmax ViT (5)")
    parser.add_argument(
        "--finetune-epochs", type=int, default=2, help="of the castled one (2)"
    )
    parser.add_argument("--train-images", type=int, default=12_000, help="(12000)")
    parser.add_argument("--test-images", type=int, default=10_000, help="(10000)")
    parser.add_argument("--lr", type=float, default=1e-3, help="softmax ViT (1e-3)")
    parser.add_argument("--finetune-lr", type=float, default=5e-4, help="(5e-4)")
    parser.add_argument("--mode", choices=("hard", "soft"), default="soft")
    parser.add_argument("--alpha", type=float, default=0.5, help="teacher's share (.5)")
    parser.add_argument("--temperature", type=float, default=2.0, help="(2)")
    parser.add_argument("--json", type=Path, default=STORED, help="result to write")
    parser.add_argument(
        "--docs", action="store_true", help="only write the page's table"
    )
    args = parser.parse_args()
    if min(args.epochs, args.finetune_epochs, args.train_images, args.test_images) < 1:
        parser.error("numbers of epochs and images must be at least 1")
    if args.train_images < BATCH_SIZE:
        parser.error(f"--train-images {args.train_images} is less than a batch, 128")
    if not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist, create it first")
    return args


# -- data ------------------------------------------------------------------------------


def find_data(folder: Path | None, download: bool) -> Path:
    """The folder with the idx files.

    Raises:
        ConfigError: If there is none; says how to get it.
    """
    candidates = [Path(os.environ.get("MMCASTLING_DATA", "data")) / "fashion-mnist"]
    candidates = [folder] if folder else [*candidates, DEBIAN]
    names = [
        rm_gz(name) for name, _ in FashionMNIST.train_list + FashionMNIST.test_list
    ]
    for candidate in candidates:
        if all(_file(candidate, name) for name in names):
            return candidate
    if download:
        try:
            FashionMNIST(data_root=str(candidates[0]), split="train", download=True)
        except Exception as error:  # whatever the network says
            raise ConfigError(f"--download failed: {error}") from error
        return candidates[0]
    looked = ", ".join(map(str, candidates))
    raise ConfigError(
        f"no Fashion-MNIST in {looked}: install Debian's dataset-fashion-mnist, give "
        "--data-root FOLDER, or let --download get it"
    )


def rm_gz(name: str) -> str:
    """A file's name without ``.gz``."""
    return name.removesuffix(".gz")


def _file(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes after the header of an idx file."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()


class Pictures(Dataset):
    """Images and labels in memory, read a batch at a time.

    Args:
        folder: Where the idx files are.
        files: Names of the files of images and of labels.
        count: How many to keep.
        augment: Generator of flips and shifts by up to 2 pixels, None for none.
    """

    metainfo = FashionMNIST.METAINFO

    def __init__(
        self,
        folder: Path,
        files: list[list[str]],
        count: int,
        augment: torch.Generator | None = None,
    ) -> None:
        images, labels = (_file(folder, rm_gz(name)) for name, _ in files)
        pixels = torch.from_numpy(_read_idx(images, header=16))
        self.images = pixels.view(-1, 1, 28, 28)[:count]
        self.labels = torch.from_numpy(_read_idx(labels, header=8)).long()[:count]
        if len(self.labels) < count:
            raise ConfigError(f"{labels} holds {len(self.labels)} images, not {count}")
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.images[indices], self.labels[indices]
        if self.augment is not None:
            flip = torch.rand(len(images), generator=self.augment) < 0.5
            images = torch.where(flip[:, None, None, None], images.flip(3), images)
            up, left = torch.randint(0, 5, (2,), generator=self.augment).tolist()
            padded = nn.functional.pad(images, (2, 2, 2, 2))
            images = padded[:, :, up : up + 28, left : left + 28]
        return images, labels


def pack(batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """A batch as MMEngine passes it on."""
    images, labels = batch
    return dict(
        inputs=images, data_samples=[DataSample().set_gt_label(n) for n in labels]
    )


# -- training and testing --------------------------------------------------------------


def train(
    model: dict[str, Any],
    data: Path,
    args: argparse.Namespace,
    seed: int,
    epochs: int,
    lr: float,
    work_dir: Path,
    load_from: Path | None = None,
) -> nn.Module:
    """Train a model on a CPU with MMEngine's runner, masks decaying where it has any.

    The data's order and augmentation depend on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = Pictures(data, FashionMNIST.train_list, args.train_images, generator)
    loader = DataLoader(
        pictures,
        BATCH_SIZE,
        sampler=RandomSampler(pictures, generator=generator),
        collate_fn=pack,
        drop_last=True,
    )
    steps = len(loader) * epochs
    warm_up = steps // 20 + 1
    hooks = []
    if model["backbone"]["attention"]["type"] == "castling":
        hooks = [dict(type="MaskDecayHook", start=START, end=1.0, finish=0.7)]
    runner = Runner(
        model=copy.deepcopy(model),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05),
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=warm_up),
            dict(type="CosineAnnealingLR", by_epoch=False, begin=warm_up, end=steps),
        ],
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=hooks,
        randomness=dict(seed=seed),
        load_from=None if load_from is None else str(load_from),
        default_scope="mmpretrain",
        experiment_name=work_dir.name,
        log_level="ERROR",
    )
    return runner.train()


@torch.no_grad()
def accuracy(model: nn.Module, data: Path, args: argparse.Namespace) -> float:
    """Top-1 accuracy on the test set, in percent."""
    pictures = Pictures(data, FashionMNIST.test_list, args.test_images)
    model.eval()
    right = 0
    for batch in DataLoader(pictures, BATCH_SIZE, collate_fn=lambda batch: batch):
        images, labels = batch
        inputs = model.data_preprocessor(dict(inputs=images))["inputs"]
        right += int((model(inputs).argmax(1) == labels).sum())
    return 100.0 * right / len(pictures)


def castled_copy(softmax: dict[str, Any]) -> nn.Module:
    """The castled network with a softmax network's weights.

    Args:
        softmax: The state dict.

    Raises:
        RuntimeError: If anything but the new convolutions has no weights.
    """
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(copy.deepcopy(CASTLED))
    missing, unexpected = model.load_state_dict(softmax, strict=False)
    if unexpected or any("local_conv" not in name for name in missing):
        raise RuntimeError(f"weights do not fit: {missing}, {unexpected}")
    return model


def run_seed(
    seed: int, data: Path, args: argparse.Namespace, folder: Path
) -> dict[str, float]:
    """All accuracies of one seed, and seconds per epoch, by name."""
    started = time.perf_counter()
    softmax = train(
        SOFTMAX, data, args, seed, args.epochs, args.lr, folder / f"softmax_{seed}"
    )
    result = {"softmax_s_per_epoch": (time.perf_counter() - started) / args.epochs}
    weights = folder / f"softmax_{seed}.pth"
    save_atomically({"state_dict": softmax.state_dict(), "meta": {}}, weights)
    result["softmax"] = accuracy(softmax, data, args)

    castled = castled_copy(load_checkpoint(weights)["state_dict"])
    result["castled_branch_on"] = accuracy(castled, data, args)
    result["castled_pruned"] = accuracy(switch_to_deploy(castled), data, args)

    control = train(
        SOFTMAX,
        data,
        args,
        seed,
        args.finetune_epochs,
        args.finetune_lr,
        folder / f"control_{seed}",
        load_from=weights,
    )
    result["softmax_finetuned"] = accuracy(control, data, args)

    taught = dict(
        CASTLED,
        type="mmcastling.DistilledClassifier",
        teacher=SOFTMAX,
        teacher_checkpoint=str(weights),
        mode=args.mode,
        alpha=args.alpha,
        temperature=args.temperature,
    )
    for name, model in (("labels", CASTLED), ("taught", taught)):
        started = time.perf_counter()
        student = train(
            model,
            data,
            args,
            seed,
            args.finetune_epochs,
            args.finetune_lr,
            folder / f"{name}_{seed}",
            load_from=weights,
        )
        seconds = time.perf_counter() - started
        result[f"{name}_s_per_epoch"] = seconds / args.finetune_epochs
        result[f"{name}_before_pruning"] = accuracy(student, data, args)
        result[f"{name}_pruned"] = accuracy(switch_to_deploy(student), data, args)
    return result


# -- the result ------------------------------------------------------------------------

ROWS = {
    "softmax": "softmax ViT, the teacher",
    "softmax_finetuned": "softmax ViT, finetuned alike (control)",
    "castled_branch_on": "castled, not finetuned, branch on",
    "castled_pruned": "castled, not finetuned, pruned",
    "labels_before_pruning": "finetuned on labels, before pruning",
    "labels_pruned": "finetuned on labels, pruned",
    "taught_before_pruning": "finetuned with the teacher, before pruning",
    "taught_pruned": "finetuned with the teacher, pruned",
    "taught_minus_labels": "teacher's gain, paired",
}


def summarise(runs: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over seeds, by name."""
    summary = {}
    for name in next(iter(runs.values())):
        values = [run[name] for run in runs.values()]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        summary[name] = dict(mean=statistics.fmean(values), std=spread)
    return summary


def table(result: dict[str, Any]) -> str:
    """The accuracies in Markdown, and how they were measured."""
    settings, place = result["settings"], result["environment"]
    lines = ["| network | top-1 accuracy, mean | std |", "| --- | --- | --- |"]
    for name, title in ROWS.items():
        row = result["summary"][name]
        lines.append(f"| {title} | {row['mean']:.2f} | {row['std']:.2f} |")
    caption = (
        f"\nPercent of {settings['test_images']:,} test images, {len(result['runs'])} "
        f"seeds; {settings['epochs']} epochs of {settings['train_images']:,} images, "
        f"then {settings['finetune_epochs']} of finetuning ({settings['mode']} "
        f"distillation, alpha {settings['alpha']:g}, T {settings['temperature']:g}). "
        f"`{result['command']}`, {result['seconds'] / 60:.0f} minutes on "
        f"{place['threads']} CPU threads, torch {place['torch']}. std is that of the "
        "seeds.\n"
    )
    return "\n".join(lines) + "\n" + caption


def page_with(result: dict[str, Any], text: str) -> str:
    """The page's text with the table between its two marks."""
    return replace_between(text, BEGIN, END, table(result))


def command(options: list[str]) -> str:
    """How to measure again, wherever the data lies."""
    places = ("--data-root", "--json")
    kept = [
        option
        for i, option in enumerate(options)
        if option not in places and (i == 0 or options[i - 1] not in places)
    ]
    return " ".join(["python benchmarks/castle_and_distil.py", *kept])


def main() -> None:
    args = parse_args()
    if args.docs:
        stored = json.loads(args.json.read_text())
        write_text_atomically(PAGE, page_with(stored, PAGE.read_text()))
        return
    data = find_data(args.data_root, args.download)
    started = time.perf_counter()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            runs[seed] = run = run_seed(seed, data, args, Path(folder))
            run["taught_minus_labels"] = run["taught_pruned"] - run["labels_pruned"]
            shown = ", ".join(f"{name} {value:.2f}" for name, value in run.items())
            print(f"seed {seed}: {shown}", flush=True)
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("data_root", "download", "docs", "json")
    }
    result = dict(
        command=command(sys.argv[1:]),
        settings=settings,
        summary=summarise(runs),
        runs={str(seed): run for seed, run in runs.items()},
        seconds=round(time.perf_counter() - started, 1),
        environment=environment(),
    )
    print(f"\n{table(result)}")
    write_json_atomically(args.json, result)
    print(f"written to {args.json}")


if __name__ == "__main__":
    run_cli(main)
