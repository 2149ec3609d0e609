"""Training steps of backbones at 512x512: forward, backward and AdamW, batch 1.

python benchmarks/training_steps.py   # measure (3 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from backbones import openmmlab
from common import Benchmark, Contender, Size, Target, image, median
from torch import Tensor, nn

from mmcastling.models import CastlingViT
from mmcastling.verbs import set_mask

SIZE: Size = (512, 512)
ROUNDS = 7


def vit(kind: str, threshold: float | str | None = None) -> Callable[[], nn.Module]:
    """A ViT-S, with its auxiliary branch at a threshold."""

    def build() -> nn.Module:
        model = CastlingViT(
            "small",
            img_size=512,
            out_type="featmap",
            with_cls_token=False,
            attention=dict(type=kind),
        )
        if threshold is not None:
            set_mask(model, threshold)
        return model

    return build


def training_step(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """A step that lowers the mean square of the features."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(images)).backward()
        optimizer.step()

    return step


BACKBONES = {
    "Castling-ViT-S, branch on at 1/N": vit("castling", "1/N"),
    "Castling-ViT-S, branch off": vit("castling", 1.0),
    "ViT-S, softmax": vit("softmax"),
    "ViT-S, Performer": vit("performer"),
    "Swin-T": openmmlab("mmdet.SwinTransformer"),
    "ResNet-50": openmmlab("mmdet.ResNet", depth=50),
}


def targets(result: dict[str, Any]) -> list[Target]:
    """What is expected of a branch that is off."""
    off, softmax = "Castling-ViT-S, branch off", "ViT-S, softmax"
    ratio = median(result, off, SIZE) / median(result, softmax, SIZE)
    return [Target("a step with the branch off: time over softmax's", ratio, 1)]


BENCHMARK = Benchmark(
    name="training_steps",
    contenders={
        name: Contender(build, image, make_pass=training_step)
        for name, build in BACKBONES.items()
    },
    repeats={SIZE: ROUNDS},
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
