"""What the study compares, and the runs that each of its tables needs."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

from benchmarks.castle_and_distil import PREPROCESSOR
from benchmarks.study.store import Run

# Pictures of 28x28 get a border of 2: patches of 4 then make 8x8 = 64 tokens, which
# windows of 4x4 tile without padding.
BORDER = 2
TOKENS = 64
WIDTH = 32

BACKBONE = dict(
    type="mmcastling.CastlingViT",
    arch=dict(
        embed_dims=WIDTH, num_layers=2, num_heads=2, feedforward_channels=2 * WIDTH
    ),
    img_size=32,
    patch_size=4,
    in_channels=1,
    with_cls_token=False,
    out_type="avg_featmap",
)
HEAD = dict(type="mmpretrain.LinearClsHead", num_classes=10, in_channels=WIDTH)

START = 0.02  # the released threshold: 1.28 times uniform attention at 64 tokens
PENALTY = 1e-4  # times the sum over 64 images, 2 heads and 64 queries of at most 1
CASTLING = dict(type="castling", local_conv="token", mask_threshold=START)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and on what everything is trained, the same for all variants.

    Args:
        train_images: The first ones of the training set.
        test_images: The first ones of the test set.
        test_images_x4: The same on images enlarged four times, to 1,024 tokens.
        epochs: Of training from scratch.
        finetune_epochs: Of finetuning a castled network.
        batch_size: Images per iteration.
        lr: Highest learning rate of AdamW.
        finetune_lr: The same when finetuning.
        weight_decay: Of matrices and kernels.
        warm_up: Fraction of training with a rising learning rate, before a cosine.
    """

    train_images: int = 6_000
    test_images: int = 10_000
    test_images_x4: int = 2_500
    epochs: int = 4
    finetune_epochs: int = 2
    batch_size: int = 64
    lr: float = 4e-3
    finetune_lr: float = 1e-3
    weight_decay: float = 0.05
    warm_up: float = 0.1


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table.

    Args:
        title: In words.
        attention: As in a backbone's config.
        hook: Arguments of ``MaskDecayHook``, None without a branch.
        ffn_conv: As in a backbone's config.
        window: Side of shifted softmax windows in place of ``attention``, 0 for none.
    """

    title: str
    attention: dict[str, Any]
    hook: dict[str, Any] | None = None
    ffn_conv: int = 0
    window: int = 0

    def model(self) -> dict[str, Any]:
        """The classifier's config."""
        backbone = dict(BACKBONE, attention=self.attention, ffn_conv=self.ffn_conv)
        return copy.deepcopy(
            dict(
                type="mmpretrain.ImageClassifier",
                data_preprocessor=PREPROCESSOR,
                backbone=backbone,
                head=HEAD,
            )
        )


def decay(**options: Any) -> dict[str, Any]:
    """Arguments of ``MaskDecayHook``; what is not given has its default."""
    return dict(dict(mode="threshold", start=START), **options)


SOFTMAX = dict(type="softmax")
ANGULAR = dict(type="linear_angular", local_conv=None)
VARIANTS: dict[str, Variant] = {
    "softmax": Variant("softmax", SOFTMAX),
    "softmax-conv": Variant(
        "softmax + convolution + output norm (control)",
        dict(SOFTMAX, local_conv="token", norm_output=True),
    ),
    "swin": Variant("softmax in shifted windows of 4x4 (Swin)", SOFTMAX, window=4),
    "performer": Variant("Performer", dict(type="performer")),
    "efficient": Variant("efficient attention", dict(type="efficient")),
    "relu": Variant("ReLU-linear", dict(type="relu_linear")),
    "focused": Variant("focused linear", dict(type="focused")),
    "angular": Variant("linear-angular", ANGULAR),
    "angular-conv": Variant(
        "linear-angular + convolution", dict(ANGULAR, local_conv="token")
    ),
    "fixed": Variant(
        "+ auxiliary branch, fixed threshold", CASTLING, decay(mode="none")
    ),
    "decay": Variant("+ mask decay (the full method)", CASTLING, decay(finish=0.7)),
    "ffn-conv": Variant(
        "full method + convolution in the MLPs", CASTLING, decay(finish=0.7), ffn_conv=5
    ),
    "decay-0.5": Variant("threshold decay, to 0.5", CASTLING, decay(finish=0.5)),
    "decay-0.9": Variant("threshold decay, to 0.9", CASTLING, decay(finish=0.9)),
    **{
        f"fade-{finish}": Variant(
            f"weight fade, to {finish}", CASTLING, decay(mode="weight", finish=finish)
        )
        for finish in (0.5, 0.7, 0.9)
    },
    "penalty": Variant(
        "fixed threshold + penalty", CASTLING, decay(mode="none", mask_penalty=PENALTY)
    ),
    "decay-grid": Variant(
        "full method, convolution on the grid",
        dict(CASTLING, local_conv="grid"),
        decay(finish=0.7),
    ),
}
MAIN = ("softmax", "performer", "angular", "decay")
TABLE_A = tuple(VARIANTS)[:12]
TABLE_B = ("angular-conv", "fixed", "decay-0.5", "decay", "decay-0.9")
TABLE_B += ("fade-0.5", "fade-0.7", "fade-0.9", "penalty")
# Trained at 32x32; (c) tests them enlarged.
RESIZED = ("softmax", "decay", "decay-grid")
SCALES = (1, 2, 4)
FINETUNED = ("softmax", "labels", "taught")


def seeds(name: str) -> range:
    """Seeds of a variant: 5 of the main contrast, else 3."""
    return range(5 if name in MAIN else 3)


def train_run(name: str, seed: int, recipe: Recipe) -> Run:
    """Training a variant from scratch."""
    variant = VARIANTS[name]
    settings = dict(
        kind="train",
        data="Fashion-MNIST",
        border=BORDER,
        recipe=dataclasses.asdict(recipe),
        model=variant.model(),
        window=variant.window,
        hook=variant.hook,
        seed=seed,
    )
    return Run("fashion", name, seed, _plain(settings))


def resize_run(
    name: str, scale: int, reference: bool, seed: int, recipe: Recipe
) -> Run:
    """Testing a trained variant on images enlarged by ``scale``."""
    settings = dict(
        kind="resize",
        trained=train_run(name, seed, recipe).settings,
        scale=scale,
        test_images=recipe.test_images_x4 if scale == 4 else recipe.test_images,
        reference_tokens=TOKENS if reference else None,
    )
    word = "reference" if reference else "plain"
    return Run("resize", f"{name}-x{scale}-{word}", seed, _plain(settings))


def finetune_run(name: str, seed: int, recipe: Recipe) -> Run:
    """Finetuning a trained softmax network: as it is, or castled, taught or not."""
    castled = name != "softmax"
    model = VARIANTS["decay" if castled else "softmax"].model()
    if name == "taught":
        model.update(type="mmcastling.DistilledClassifier", mode="soft")
        model.update(alpha=0.5, temperature=2.0)
    settings = dict(
        kind="finetune",
        trained=train_run("softmax", seed, recipe).settings,
        model=model,
        hook=decay(finish=0.7) if castled else None,
        seed=seed,
    )
    return Run("finetune", name, seed, _plain(settings))


def scratch_run(seed: int, recipe: Recipe) -> Run:
    """The full method from scratch, as long as training and finetuning together."""
    epochs = recipe.epochs + recipe.finetune_epochs
    run = train_run("decay", seed, dataclasses.replace(recipe, epochs=epochs))
    return dataclasses.replace(run, name="decay-long")


def table_runs(table: str, recipe: Recipe) -> list[Run]:
    """The runs of a table on Fashion-MNIST, seed by seed.

    Args:
        table: ``'a'``, ``'b'``, ``'c'`` or ``'d'``.
        recipe: How to train.
    """
    if table in ("a", "b"):
        names = TABLE_A if table == "a" else TABLE_B
        return [
            train_run(name, seed, recipe)
            for seed in range(5)
            for name in names
            if seed in seeds(name)
        ]
    if table == "c":
        return [
            run
            for seed in range(3)
            for name in RESIZED
            for run in _resize_runs(name, seed, recipe)
        ]
    return [
        run
        for seed in range(3)
        for run in (
            scratch_run(seed, recipe),
            *(finetune_run(name, seed, recipe) for name in FINETUNED),
        )
    ]


def _resize_runs(name: str, seed: int, recipe: Recipe) -> list[Run]:
    runs = [train_run(name, seed, recipe)]
    for scale in SCALES[1:]:
        # At the resolution of training both are the same, and softmax knows only one.
        for reference in (False, True) if name != "softmax" else (False,):
            runs.append(resize_run(name, scale, reference, seed, recipe))
    return runs


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON will give it back."""
    return json.loads(json.dumps(settings))
