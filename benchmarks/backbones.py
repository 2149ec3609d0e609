"""Deployed backbones over the resolution, in the form that a detector takes.

python benchmarks/backbones.py        # measure (12 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

*no mixing* is the plain network whose attentions are their projections alone. The
softmax twins of ViT-S and MViTv2-T are the published originals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from attention import Values
from common import Benchmark, Contender, Size, Target, image, median
from mmdet.utils import register_all_modules
from mmengine.registry import MODELS
from torch import nn

from mmcastling.verbs import switch_to_deploy

SIZES: tuple[Size, ...] = ((224, 224), (512, 512), (800, 1344))
REPEATS = dict(zip(SIZES, (21, 9, 5), strict=True))
SOFTMAX = dict(type="softmax")
TOKEN_CONV = dict(type="castling", local_conv="token")


def openmmlab(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """Builds a backbone from its config, deployed if it is ours."""

    def build() -> nn.Module:
        register_all_modules(init_default_scope=False)
        model = MODELS.build(dict(type=kind, **options))
        return switch_to_deploy(model, inplace=True)

    return build


def vit(attention: dict[str, Any]) -> Callable[[], nn.Module]:
    return openmmlab(
        "mmcastling.CastlingViT",
        arch="small",
        img_size=1024,
        with_cls_token=False,
        out_type="featmap",
        attention=attention,
    )


def vit_without_mixing() -> nn.Module:
    model = vit(SOFTMAX)()
    for block in model.layers:
        mixer = block.attn.mixer
        block.attn.mixer = Values(mixer.num_heads, mixer.head_dims)
    return model


def mvit(**options: Any) -> Callable[[], nn.Module]:
    return openmmlab(
        "mmcastling.CastlingMViT", arch="tiny", out_indices=(0, 1, 2, 3), **options
    )


def levit(**options: Any) -> Callable[[], nn.Module]:
    return openmmlab(
        "mmcastling.CastlingLeViT", arch="256", out_indices=(0, 1, 2), **options
    )


def pvt(num_layers: list[int]) -> Callable[[], nn.Module]:
    return openmmlab(
        "mmdet.PyramidVisionTransformerV2",
        embed_dims=64,
        num_layers=num_layers,
    )


def from_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, features_only=True)


BACKBONES = {
    "Castling-ViT-S": vit(TOKEN_CONV),
    "ViT-S, no mixing": vit_without_mixing,
    "ViT-S, softmax": vit(SOFTMAX),
    "Castling-MViTv2-T": mvit(ffn_conv=5),
    "MViTv2-T, softmax": mvit(attention=SOFTMAX),
    "Castling-LeViT-256": levit(ffn_conv=5),
    "LeViT-256, softmax": levit(attention=SOFTMAX),
    "Swin-T": openmmlab("mmdet.SwinTransformer"),
    "ResNet-50": openmmlab("mmdet.ResNet", depth=50),
    "PVTv2-B1": pvt([2, 2, 2, 2]),
    "PVTv2-B2": pvt([3, 4, 6, 3]),
    "EfficientViT-B1 (timm)": from_timm("efficientvit_b1"),
    "EfficientViT-B2 (timm)": from_timm("efficientvit_b2"),
}
# Its attention on the first scale of a large image takes half a minute; three rounds
# there are measured with those that it is compared with.
LARGE = SIZES[-1]


def targets(result: dict[str, Any]) -> list[Target]:
    """What was to be reached, at 800x1344."""

    def speed(name: str, over: str) -> float:
        return median(result, over, LARGE) / median(result, name, LARGE)

    castled = "Castling-ViT-S"
    return [
        Target(
            "ViT-S: time over that without token mixing",
            1 / speed(castled, "ViT-S, no mixing"),
            1.04,
        ),
        Target(
            "ViT-S: speed over its softmax twin's",
            speed(castled, "ViT-S, softmax"),
            2.6,
            least=True,
        ),
        Target(
            "MViTv2-T: speed over its softmax original's",
            speed("Castling-MViTv2-T", "MViTv2-T, softmax"),
            7,
            least=True,
        ),
    ]


BENCHMARK = Benchmark(
    name="backbones",
    contenders={name: Contender(build, image) for name, build in BACKBONES.items()},
    repeats=REPEATS,
)

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    BENCHMARK.main(__doc__)
