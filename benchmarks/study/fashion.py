"""Training and testing small classifiers on Fashion-MNIST, in memory on a CPU."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.datasets import FashionMNIST
from mmpretrain.models.utils import ShiftWindowMSA
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from benchmarks.castle_and_distil import Pictures
from benchmarks.study.store import Run, Store
from benchmarks.study.variants import BORDER, VARIANTS, Recipe, train_run
from mmcastling.analysis import count_macs
from mmcastling.attention import LinearAngularMixer
from mmcastling.checkpoint import load_checkpoint, save_atomically
from mmcastling.train import MaskDecayHook
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

RECORDS = 60  # points of a curve over training


class Data:
    """Pictures in memory, with a border of black.

    Args:
        folder: Where the idx files are.
        recipe: How many of them to use.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        splits = (
            (FashionMNIST.train_list, recipe.train_images),
            (FashionMNIST.test_list, recipe.test_images),
        )
        self.train, self.test = (Pictures(folder, *split) for split in splits)
        for split in (self.train, self.test):
            split.images = nn.functional.pad(split.images, (BORDER,) * 4)


class SwinAttention(nn.Module):
    """mmpretrain's attention in shifted windows as an attention of ``CastlingViT``."""

    def __init__(self, embed_dims: int, num_heads: int, window: int, shift: int):
        super().__init__()
        self.msa = ShiftWindowMSA(embed_dims, num_heads, window, shift)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.msa(x, grid)


def build(model: dict[str, Any], window: int = 0) -> nn.Module:
    """A classifier from its config, its weights not initialised."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        classifier = MODELS.build(copy.deepcopy(model))
    if window:
        backbone = classifier.backbone
        heads = backbone.arch_settings["num_heads"]
        for i, layer in enumerate(backbone.layers):
            shift = window // 2 if i % 2 else 0
            layer.attn = SwinAttention(backbone.embed_dims, heads, window, shift)
    return classifier


def initialised(model: dict[str, Any], window: int, seed: int) -> nn.Module:
    """A classifier whose weights are those of plain softmax wherever it has them."""
    torch.manual_seed(seed)
    softmax = build(VARIANTS["softmax"].model())
    softmax.init_weights()
    torch.manual_seed(seed)
    classifier = build(model, window)
    classifier.init_weights()
    own = classifier.state_dict(keep_vars=True)
    own = {name.replace(".msa.w_msa.", "."): value for name, value in own.items()}
    with torch.no_grad():
        for name, value in softmax.state_dict().items():
            own[name].copy_(value)
    return classifier


# -- training --------------------------------------------------------------------------


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Fraction of the highest learning rate at a point of training."""
    if progress < recipe.warm_up:
        return progress / recipe.warm_up
    rest = (progress - recipe.warm_up) / (1.0 - recipe.warm_up)
    return (1.0 + math.cos(math.pi * rest)) / 2.0


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    hook: dict[str, Any] | None,
    seed: int,
    epochs: int,
    lr: float,
) -> dict[str, Any]:
    """Train in place; batches depend on the seed alone.

    Returns:
        CPU seconds and curves over training.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = [DataSample().set_gt_label(label) for label in data.train.labels]
    decayed = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] > 1]
    others = [p for p in model.parameters() if p.ndim <= 1 or p.shape[0] <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decayed), dict(params=others, weight_decay=0.0)],
        lr=lr,
        weight_decay=recipe.weight_decay,
    )
    schedule = None if hook is None else MaskDecayHook(**hook)
    batches = len(samples) // recipe.batch_size
    steps = epochs * batches
    every = max(1, steps // RECORDS)
    curve: dict[str, list[float]] = dict(step=[], loss=[])
    started = time.process_time()
    model.train()
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(samples), generator=generator)
        if schedule is not None:
            apply_masks(model, schedule, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate((step + 1) / steps, recipe)
        first = step % batches * recipe.batch_size
        chosen = order[first : first + recipe.batch_size].tolist()
        inputs = model.data_preprocessor(dict(inputs=data.train.images[chosen]))
        losses = model.loss(inputs["inputs"], [samples[i] for i in chosen])
        loss = sum(value for name, value in losses.items() if "loss" in name)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == steps - 1:
            record(curve, model, step, loss.item())
    seconds = time.process_time() - started
    if schedule is not None:
        apply_masks(model, schedule, steps, steps)
    return dict(steps=steps, train_cpu_seconds=round(seconds, 2), curve=curve)


def apply_masks(
    model: nn.Module, schedule: MaskDecayHook, step: int, steps: int
) -> None:
    """Set the masks as the hook does before an iteration."""
    progress = schedule.progress(step, steps)
    set_mask(model, *schedule.state_at(progress), schedule.mask_penalty)


def record(
    curve: dict[str, list[float]], model: nn.Module, step: int, loss: float
) -> None:
    """Append the state of training to a curve."""
    curve["step"].append(step)
    curve["loss"].append(round(loss, 4))
    modules = [module for _, module in castling_modules(model)]
    if not modules:
        return
    densities = [module.branch.density.item() for module in modules]
    state = dict(
        threshold=modules[0].branch.threshold.probability,
        weight=modules[0].branch.weight,
        density=sum(densities) / len(densities),
    )
    state |= {f"density_layer{i}": value for i, value in enumerate(densities)}
    for name, value in state.items():
        curve.setdefault(name, []).append(round(value, 6))


# -- testing ---------------------------------------------------------------------------


@torch.no_grad()
def predict(
    model: nn.Module, data: Data, scale: int = 1, count: int | None = None
) -> Tensor:
    """Predicted classes of the first test images, enlarged ``scale`` times."""
    model.eval()
    found = []
    for images in data.test.images[:count].split(128 // scale**2):
        inputs = model.data_preprocessor(dict(inputs=images))["inputs"]
        if scale != 1:
            inputs = nn.functional.interpolate(
                inputs, scale_factor=scale, mode="bilinear", align_corners=False
            )
        found.append(model(inputs).argmax(1))
    return torch.cat(found)


def percent(equal: Tensor) -> float:
    """How many are true, in percent."""
    return round(100.0 * equal.float().mean().item(), 3)


def test(model: nn.Module, data: Data) -> dict[str, Any]:
    """Accuracy in percent before and after pruning, parameters and MACs."""
    image = torch.zeros(1, 1, *data.test.images.shape[2:])
    before = predict(model, data)
    result = dict(accuracy_before=percent(before == data.test.labels))
    result["macs_before"] = count_macs(model, image).macs
    deployed = switch_to_deploy(model)
    after = before if not any(castling_modules(model)) else predict(deployed, data)
    cost = count_macs(deployed, image)
    return dict(
        result,
        accuracy=percent(after == data.test.labels),
        changed_by_pruning=percent(after != before),
        params=cost.params,
        macs=cost.macs,
    )


# -- runs ------------------------------------------------------------------------------


class Trainer:
    """Carries out runs; keeps the weights that later runs start from.

    Args:
        data: The pictures.
        recipe: How to train.
        store: Where results go.
        work_dir: Where weights go.
    """

    def __init__(self, data: Data, recipe: Recipe, store: Store, work_dir: Path):
        self.data = data
        self.recipe = recipe
        self.store = store
        self.work_dir = work_dir

    def carry_out(self, run: Run) -> dict[str, Any]:
        """The result of a run, stored."""
        result = getattr(self, f"_{run.settings['kind']}")(run)
        self.store.save(run, result)
        return result

    @staticmethod
    def headline(result: dict[str, Any]) -> str:
        """A result in a few words."""
        return f"{result['accuracy']:.2f}%"

    def _train(self, run: Run) -> dict[str, Any]:
        settings = run.settings
        model = initialised(settings["model"], settings["window"], run.seed)
        recipe = Recipe(**settings["recipe"])
        result = train(
            model,
            self.data,
            recipe,
            settings["hook"],
            run.seed,
            recipe.epochs,
            recipe.lr,
        )
        weights = self._weights(run)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(dict(state_dict=model.state_dict(), meta={}), weights)
        return {**test(model, self.data), **result}

    def _weights(self, run: Run) -> Path:
        return self.work_dir / f"{run}-{run.digest[:12]}.pth"

    def _trained(self, name: str, seed: int) -> Path:
        """The weights of a variant; trains it where they are missing."""
        run = train_run(name, seed, self.recipe)
        if not self._weights(run).is_file():
            self.carry_out(run)
        return self._weights(run)

    def _resize(self, run: Run) -> dict[str, Any]:
        settings = run.settings
        model = build(settings["trained"]["model"], settings["trained"]["window"])
        name = run.name.partition("-x")[0]
        weights = load_checkpoint(self._trained(name, run.seed))
        model.load_state_dict(weights["state_dict"])
        model = switch_to_deploy(model)
        for module in model.modules():
            if isinstance(module, LinearAngularMixer):
                module.reference_tokens = settings["reference_tokens"]
        count = settings["test_images"]
        found = predict(model, self.data, settings["scale"], count)
        return dict(accuracy=percent(found == self.data.test.labels[:count]))

    def _finetune(self, run: Run) -> dict[str, Any]:
        settings, recipe = run.settings, self.recipe
        weights = self._trained("softmax", run.seed)
        config = dict(settings["model"])
        if config["type"] == "mmcastling.DistilledClassifier":
            config["teacher"] = settings["trained"]["model"]
            config["teacher_checkpoint"] = str(weights)
        torch.manual_seed(run.seed)
        model = build(config)
        model.init_weights()
        state = load_checkpoint(weights)["state_dict"]
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any("local_conv" not in name for name in missing):
            raise RuntimeError(f"weights do not fit: {missing}, {unexpected}")
        result = {}
        if settings["hook"] is not None:
            result["accuracy_castled"] = test(model, self.data)["accuracy"]
        # Other batches than the network was trained with.
        trained = train(
            model,
            self.data,
            recipe,
            settings["hook"],
            run.seed + 1000,
            recipe.finetune_epochs,
            recipe.finetune_lr,
        )
        return {**result, **test(model, self.data), **trained}
