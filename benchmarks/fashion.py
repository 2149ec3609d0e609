"""Attentions on Fashion-MNIST, trained to the end, and what a castled one keeps.

python benchmarks/fashion.py rates             # a learning rate for each row; hours
python benchmarks/fashion.py train --seeds 0   # every row from scratch; hours
python benchmarks/fashion.py finetune          # castle, align and finetune softmax
python benchmarks/fashion.py times             # of a picture, softmax and castled

All is resumable, epoch by epoch, and every result is a file. Needs Fashion-MNIST as idx
files; Debian's package ``dataset-fashion-mnist`` has them. The last 5,000 training
pictures are never trained on: rates are chosen and curves are drawn by them. The test
set is looked at once, when a run has ended. Layers are trained in bfloat16 (autocast)
with ``--amp``, and tested in float32.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from align_dinov2 import TIMES, store_times
from common import ROOT
from fashion_data import TEST, TRAIN, find_data, read
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models.utils import ShiftWindowMSA
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmcastling import align, castle, set_mask, switch_to_deploy
from mmcastling.analysis import count_macs
from mmcastling.analysis.machine import environment
from mmcastling.castle import RECOMMENDED as CASTLED
from mmcastling.checkpoint import (
    load_checkpoint,
    save_atomically,
    write_json_atomically,
)
from mmcastling.decay import MaskDecay
from mmcastling.run import ConfigError, run_cli
from mmcastling.train import MaskDecayHook
from mmcastling.verbs import castling_modules

STORED = ROOT / "benchmarks" / "results" / "fashion"
TRAINED, WIDTH, PARTS = 55_000, 64, 4  # pictures; channels; means along a side
BATCH, WEIGHT_DECAY, WARM_UP = 32, 0.05, 0.1
EPOCHS, RATE_EPOCHS, RATE_PICTURES, FINETUNE_EPOCHS = 5, 2, 12_000, 2
RATES, FINETUNE_RATE = (1e-3, 2e-3, 4e-3), 5e-4

# 28x28 pixels; convolutions before the attention, to 14x14 = 196 tokens as ImageNet's,
# and behind it, to 7x7. The classifier reads 4x4 means of these, whatever the size:
# with one mean of all, softmax stayed at 91.1 after six epochs.
BACKBONE = dict(
    type="mmcastling.CastlingViT",
    arch=dict(embed_dims=WIDTH, num_layers=2, num_heads=1, feedforward_channels=128),
    img_size=28,
    patch_size=2,
    in_channels=1,
    with_cls_token=False,
    out_type="featmap",
)
MODEL = dict(
    type="mmpretrain.ImageClassifier",
    data_preprocessor=dict(
        type="mmpretrain.ClsDataPreprocessor",
        num_classes=10,
        mean=[72.94],
        std=[90.02],
    ),
    head=dict(
        type="mmpretrain.LinearClsHead",
        num_classes=10,
        in_channels=2 * WIDTH * PARTS**2,
    ),
)
SOFTMAX = dict(type="softmax")
RELEASED = dict(type="castling", local_conv="grid", mask_threshold="1/N")
RECOMMENDED = dict(CASTLED, type="castling", mask_threshold="1/N")
CONTROL = dict(SOFTMAX, local_conv="grid", norm_output=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row trains: options of the backbone, or Swin's ``window``."""

    title: str
    attention: dict[str, Any]
    ffn_conv: int = 0
    window: int = 0

    def build(self, seed: int) -> nn.Module:
        """A classifier, whose weights are softmax's wherever both have them."""
        torch.manual_seed(seed)
        plain = _classifier(SOFTMAX, 0)
        plain.init_weights()
        torch.manual_seed(seed)
        model = _classifier(self.attention, self.ffn_conv)
        if self.window:
            for i, layer in enumerate(model.backbone.layers):
                shift = self.window // 2 if i % 2 else 0
                layer.attn = WindowAttention(WIDTH, 1, self.window, shift)
        model.init_weights()
        own = model.state_dict(keep_vars=True)
        own = {name.replace(".msa.w_msa.", "."): value for name, value in own.items()}
        with torch.no_grad():
            for name, value in plain.state_dict().items():
                if name in own and own[name].shape == value.shape:
                    own[name].copy_(value)
        return model


class WindowAttention(nn.Module):
    """mmpretrain's attention in shifted windows as an attention of ``CastlingViT``."""

    def __init__(self, embed_dims: int, num_heads: int, window: int, shift: int):
        super().__init__()
        self.msa = ShiftWindowMSA(embed_dims, num_heads, window, shift)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.msa(x, grid)


ROWS = {
    "softmax": Row("softmax", SOFTMAX),
    "control": Row("softmax + convolution + output norm (control)", CONTROL),
    "swin": Row("softmax in shifted windows of 7x7 (Swin)", SOFTMAX, window=7),
    "performer": Row("Performer", dict(type="performer")),
    "angular": Row(
        "linear-angular + convolution", dict(type="linear_angular", local_conv="grid")
    ),
    "released": Row("full method, released form", RELEASED),
    "recommended": Row("full method, 8x8 landmarks", RECOMMENDED),
    "landmarks-4": Row("full method, 4x4 landmarks", dict(RECOMMENDED, landmarks=4)),
    "recommended-mlp": Row(
        "full method, 8x8 landmarks, convolution in the MLPs", RECOMMENDED, ffn_conv=3
    ),
    "control-mlp": Row("control, convolution in the MLPs", CONTROL, ffn_conv=3),
}
STARTS = {
    "softmax": "softmax, finetuned alike",
    "castled": "castled, not aligned, finetuned",
    "aligned": "castled, aligned, finetuned",
    "bridged": "castled, aligned with the decaying branch, finetuned",
}


class Stem(nn.Sequential):
    """Images to ``WIDTH`` channels at half the resolution, as tokens."""

    init_out_size = (14, 14)

    def __init__(self) -> None:
        half = WIDTH // 2
        super().__init__(
            *_convolution(1, half),
            nn.GELU(),
            *_convolution(half, WIDTH, stride=2),
            nn.GELU(),
            *_convolution(WIDTH, WIDTH),
            nn.GELU(),
            *_convolution(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = super().forward(x.contiguous(memory_format=torch.channels_last))
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class Neck(nn.Sequential):
    """A convolution of stride 2, then ``PARTS`` x ``PARTS`` means of the map."""

    def __init__(self) -> None:
        super().__init__(
            *_convolution(WIDTH, 2 * WIDTH, stride=2),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(PARTS),
            nn.Flatten(),
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (super().forward(maps[-1]),)


def _convolution(before: int, after: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(after)]


def _classifier(attention: dict[str, Any], ffn_conv: int) -> nn.Module:
    backbone = dict(BACKBONE, attention=attention, ffn_conv=ffn_conv)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(copy.deepcopy(dict(MODEL, backbone=backbone)))
    model.backbone.patch_embed = Stem()
    model.neck = Neck()
    return model


class Data:
    """Pictures and labels in memory: to train on, to validate and to test with."""

    def __init__(
        self,
        folder: Path,
        trained: int = TRAINED,
        validated: int = 5_000,
        tested: int = 10_000,
    ) -> None:
        images, labels = read(folder, TRAIN, trained + validated)
        self.images, self.labels = images[:trained], labels[:trained]
        self.validation = images[trained:], labels[trained:]
        self.test = read(folder, TEST, tested)

    def batch(self, seed: int, epoch: int, step: int, count: int) -> tuple[Tensor, ...]:
        """Pictures, half of them flipped, decided by the arguments alone."""
        noise = torch.Generator().manual_seed(1_000 * seed + epoch)
        order = torch.randperm(count, generator=noise)
        chosen = order[step * BATCH : (step + 1) * BATCH]
        noise = torch.Generator().manual_seed((1_000 * seed + epoch) * 10_000 + step)
        flip = torch.rand(len(chosen), generator=noise) < 0.5
        images = self.images[chosen]
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        return images, self.labels[chosen]


def train(
    model: nn.Module,
    data: Data,
    state: Path,
    *,
    seed: int,
    epochs: int,
    rate: float,
    count: int = TRAINED,
    decays: bool = True,
    amp: bool = False,
) -> dict[str, Any]:
    """Train in place, going on from the last epoch in ``state``; curves and seconds.

    Masks decay if the model has any and ``decays``, and otherwise stay as they are.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed), dict(params=others, weight_decay=0.0)],
        lr=rate,
        weight_decay=WEIGHT_DECAY,
    )
    decays = decays and any(True for _ in castling_modules(model))
    hook = MaskDecayHook(start="1/N", finish=0.7) if decays else None
    curve: list[dict[str, float]] = []
    settings = dict(
        seed=seed, epochs=epochs, rate=rate, count=count, amp=amp, decays=decays
    )
    if state.is_file():
        saved = load_checkpoint(state)
        _check_settings(state, saved["settings"], settings)
        model.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        curve = saved["curve"]
    steps = count // BATCH
    for epoch in range(len(curve), epochs):
        started, total = time.process_time(), 0.0
        model.train()
        for step in range(steps):
            done = epoch * steps + step
            if hook is not None:
                _set_masks(model, hook, done, epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate((done + 1) / (epochs * steps))
            images, labels = data.batch(seed, epoch, step, count)
            inputs = model.data_preprocessor(dict(inputs=images))["inputs"]
            samples = [DataSample().set_gt_label(label) for label in labels]
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                losses = model.loss(inputs, samples)
            optimizer.zero_grad()
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += losses["loss"].item()
        seconds = time.process_time() - started
        if hook is not None:
            _set_masks(model, hook, (epoch + 1) * steps, epochs * steps)
        found = dict(loss=total / steps, cpu_seconds=seconds)
        found["validation"] = accuracy(model, data.validation)
        curve.append(found)
        print(f"  epoch {epoch + 1} of {epochs}: {found}", flush=True)
        saved = dict(state_dict=model.state_dict(), curve=curve, settings=settings)
        state.parent.mkdir(parents=True, exist_ok=True)
        save_atomically({**saved, "optimizer": optimizer.state_dict()}, state)
    return dict(
        curve=[round(found["validation"], 2) for found in curve],
        loss=[round(found["loss"], 4) for found in curve],
        cpu_seconds=round(sum(found["cpu_seconds"] for found in curve), 1),
    )


def _check_settings(path: Path, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """ConfigError where a run was begun, or stored, with other settings."""
    for name, value in asked.items():
        if stored.get(name) != value:
            raise ConfigError(
                f"{path} was made with {name}={stored.get(name)}, now it is {value}: "
                "move it aside, or ask for the same"
            )


def learning_rate(progress: float) -> float:
    """Fraction of the highest rate: rising, then a cosine."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def _set_masks(model: nn.Module, hook: MaskDecayHook, step: int, steps: int) -> None:
    set_mask(model, *hook.state_at(hook.progress(step, steps)), hook.mask_penalty)


@torch.no_grad()
def accuracy(
    model: nn.Module, pictures: tuple[Tensor, Tensor], scale: float = 1.0
) -> float:
    """Percent that are right, of pictures enlarged ``scale`` times."""
    model.eval()
    right = 0
    for images, labels in zip(*(part.split(500) for part in pictures), strict=True):
        inputs = model.data_preprocessor(dict(inputs=images))["inputs"]
        if scale != 1:
            inputs = nn.functional.interpolate(
                inputs, scale_factor=scale, mode="bilinear", align_corners=False
            )
        right += int((model(inputs).argmax(1) == labels).sum())
    return 100.0 * right / len(pictures[1])


def tested(model: nn.Module, data: Data) -> dict[str, Any]:
    """What the deployed model has of the test set, also enlarged, and its cost."""
    before = accuracy(model, data.test)
    deployed = switch_to_deploy(model)
    cost = count_macs(deployed, torch.zeros(1, 1, 28, 28))
    return dict(
        before=before,
        accuracy={str(s): accuracy(deployed, data.test, s) for s in (1.0, 1.5, 2.0)},
        macs=cost.macs,
        params=cost.params,
    )


# -- runs ------------------------------------------------------------------------------


def chosen_rate(name: str) -> float:
    """The rate with the best validation; ConfigError where not all are stored."""
    found = {}
    for rate in RATES:
        path = STORED / f"rate-{name}-{rate:g}.json"
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist: python benchmarks/fashion.py rates --rows "
                f"{name}"
            )
        found[rate] = json.loads(path.read_text())["curve"][-1]
    return max(found, key=found.__getitem__)


def try_rates(name: str, data: Data, args: argparse.Namespace) -> None:
    """A short training at each rate, without the test set."""
    for rate in RATES:
        run = f"rate-{name}-{rate:g}"
        options = dict(
            epochs=RATE_EPOCHS, rate=rate, count=RATE_PICTURES, seed=100, amp=args.amp
        )
        if _is_stored(run, options):
            continue
        model = ROWS[name].build(100)
        _store(
            run, train(model, data, args.work_dir / f"{run}.pth", **options), options
        )


def train_row(name: str, seed: int, data: Data, args: argparse.Namespace) -> None:
    """A row from scratch to the end."""
    run = f"train-{name}-{seed}"
    options = dict(epochs=EPOCHS, rate=chosen_rate(name), seed=seed, amp=args.amp)
    if _is_stored(run, options):
        return
    model = ROWS[name].build(seed)
    result = train(model, data, args.work_dir / f"{run}.pth", **options)
    title = dict(title=ROWS[name].title)
    _store(run, {**title, **result, **tested(model, data)}, options)


def finetune(start: str, seed: int, data: Data, args: argparse.Namespace) -> None:
    """A trained softmax network, castled and aligned or not, finetuned."""
    run = f"finetune-{start}-{seed}"
    # Other batches than those that the network was trained with.
    options = dict(
        epochs=FINETUNE_EPOCHS, rate=FINETUNE_RATE, seed=seed + 100, amp=args.amp
    )
    if _is_stored(run, options):
        return
    weights = args.work_dir / f"train-softmax-{seed}.pth"
    saved = load_checkpoint(weights) if weights.is_file() else dict(curve=[])
    if len(saved["curve"]) < EPOCHS:
        raise ConfigError(
            f"{weights} is not trained to its end: python benchmarks/fashion.py train "
            f"--rows softmax --seeds {seed}"
        )
    teacher = ROWS["softmax"].build(seed)
    teacher.load_state_dict(saved["state_dict"])
    model, result = copy.deepcopy(teacher), {}
    if start != "softmax":
        model.backbone = castle(model.backbone)
        set_mask(model, 1.0)
        result["castled"] = accuracy(model, data.validation)
    if start in ("aligned", "bridged"):

        def images(step: int) -> Tensor:
            epoch, step = divmod(step, TRAINED // BATCH)
            batch, _ = data.batch(200 + seed, epoch, step, TRAINED)
            return model.data_preprocessor(dict(inputs=batch))["inputs"]

        align(
            model.backbone,
            teacher.backbone,
            images,
            mask=MaskDecay(start=1.0 if start == "aligned" else "4/N"),
            folder=args.work_dir / f"{start}-{seed}",
        )
        result["aligned"] = accuracy(model, data.validation)
    # The branch stays off, as it was in the alignment.
    trained = train(model, data, args.work_dir / f"{run}.pth", decays=False, **options)
    _store(
        run,
        {**result, "title": STARTS[start], **trained, **tested(model, data)},
        options,
    )


def _is_stored(run: str, options: dict[str, Any]) -> bool:
    path = STORED / f"{run}.json"
    if not path.is_file():
        print(run, flush=True)
        return False
    try:
        found = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged ({error!r}): delete it, and the run is made again"
        ) from error
    _check_settings(path, found, options)
    print(f"{run}: stored already")
    return True


def _store(run: str, result: dict[str, Any], options: dict[str, Any]) -> None:
    STORED.mkdir(parents=True, exist_ok=True)
    content = dict(result, settings=options, environment=environment("cpu"))
    write_json_atomically(STORED / f"{run}.json", content)
    print(run, result["curve"][-1], result.get("accuracy", ""), flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=("rates", "train", "finetune", TIMES))
    add("--rows", nargs="+", metavar="ROW", help="some of the part's rows")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--data-root", type=Path, help="folder of the idx files")
    add("--work-dir", type=Path, default=Path("work_dirs/fashion"))
    add("--amp", action="store_true", help="train in bfloat16")
    args = parser.parse_args()
    rows = STARTS if args.part == "finetune" else ROWS
    unknown = set(args.rows or ()) - set(rows)
    if unknown:
        parser.error(f"--rows {' '.join(unknown)}: choose from {', '.join(rows)}")
    args.rows = args.rows or list(rows)
    return args


def main() -> None:
    args = parse_args()
    MMLogger.get_current_instance().setLevel("WARNING")  # not each weight's start
    if args.part == TIMES:
        softmax, castled = (ROWS["softmax"].build(0) for _ in range(2))
        castled.backbone = castle(castled.backbone)
        STORED.mkdir(parents=True, exist_ok=True)
        sizes = [(28 * n, 28 * n) for n in (1, 2)]
        store_times(STORED / f"{TIMES}.json", softmax, castled, sizes, channels=1)
        return
    data = Data(find_data(args.data_root))
    if args.part == "rates":
        for name in args.rows:
            try_rates(name, data, args)
    elif args.part == "train":
        for seed in args.seeds:
            for name in args.rows:
                train_row(name, seed, data, args)
    else:
        for seed in args.seeds:
            for start in args.rows:
                finetune(start, seed, data, args)


if __name__ == "__main__":
    run_cli(main)
