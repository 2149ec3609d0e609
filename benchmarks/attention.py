"""Deployed attention layers over the number of tokens: 384 channels, 6 heads.

python benchmarks/attention.py        # measure (3 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

*castling* is the deployed layer, *landmarks* the same in the form that ``castle`` gives
to trained weights, with 8x8 landmarks or fewer, *softmax* torch's fused attention,
*projections* the linear layers alone, all computed as in deployed models; *released* is
the authors' order of operations for castling in eager mode, with torch's.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import Benchmark, Contender, Size, Target, infer, median, spread
from torch import Tensor, nn

from mmcastling.analysis import paired_seconds
from mmcastling.attention import Attention, TokenMixer
from mmcastling.attention.fast import apply_layer
from mmcastling.castle import RECOMMENDED

CHANNELS, HEADS = 384, 6
GRIDS: tuple[Size, ...] = (
    (14, 14),
    (32, 32),
    (32, 64),
    (50, 84),
    (64, 128),
    (128,) * 2,
)
REPEATS = dict(zip(GRIDS, (301, 61, 41, 21, 9, 5), strict=True))
PEERS = ("performer", "efficient", "hydra", "relu_linear", "focused")
GEMM_REPEATS = 21


class Values(TokenMixer):
    """Mixes nothing, which leaves the block's linear layers: no token hears another."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v


class ReleasedAttention(Attention):
    """The layer without its branch in the released order of operations.

    Heads in front of tokens, both lengths divided out, and a plain convolution.
    """

    def forward(self, x: Tensor, grid: Size | None = None) -> Tensor:
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        conv = self.mixer.local_conv
        conv = nn.functional.conv2d(
            v, conv.weight, padding=conv.padding, groups=self.num_heads
        )
        q = q / q.norm(dim=-1, keepdim=True)
        k = k / k.norm(dim=-1, keepdim=True)
        y = 0.5 * v + q @ (k.transpose(-2, -1) @ v) / math.pi
        y = y / y.norm(dim=-1, keepdim=True) + conv
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, channels))


def layer(kind: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Attention(CHANNELS, HEADS, kind, **options, deploy=True)


def projections() -> nn.Module:
    block = Attention(CHANNELS, HEADS, deploy=True)
    block.mixer = Values(block.mixer.num_heads, block.mixer.head_dims)
    return block


def tokens(grid: Size) -> tuple[Tensor, Size]:
    """Seeded tokens ``(1, H * W, C)`` and their grid."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, grid[0] * grid[1], CHANNELS, generator=generator), grid


LAYERS = {
    "castling": layer("castling"),
    "landmarks": layer("castling", **RECOMMENDED),
    "4x4 landmarks": layer("castling", **RECOMMENDED, landmarks=4),
    "released": lambda: ReleasedAttention(CHANNELS, HEADS),
    "projections": projections,
    "softmax": layer("softmax"),
    **{name: layer(name) for name in PEERS},
}


def gemm_throughput(device: str) -> dict[str, Any]:
    """GFLOP/s of linear layers, the roofline: of the layer's shape, and a large one.

    By torch's own layer, and as deployed.
    """
    shapes = {"4200x384x1152": (4200, 384, 1152), "2048x2048x2048": (2048,) * 3}
    passes = {}
    for label, (m, k, n) in shapes.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.ones(m, k, device=device, dtype=dtype)
            layer = nn.Linear(k, n, device=device, dtype=dtype)
            name = f"{label} {str(dtype).removeprefix('torch.')}"
            passes[f"{name}, torch's"] = functools.partial(infer, layer, x)
            passes[f"{name}, deployed"] = functools.partial(
                infer, functools.partial(apply_layer, layer), x
            )
    seconds = paired_seconds(passes, GEMM_REPEATS)
    return dict(
        gemm={
            name: spread(
                [2 * math.prod(shapes[name.split()[0]]) / t / 1e9 for t in times]
            )
            for name, times in seconds.items()
        }
    )


def slope(result: dict[str, Any]) -> float:
    """Slope of log seconds over log tokens of castling, from 1,024 tokens on."""
    grids = [grid for grid in GRIDS if math.prod(grid) >= 1024]
    return statistics.linear_regression(
        [math.log(math.prod(grid)) for grid in grids],
        [math.log(median(result, "castling", grid)) for grid in grids],
    ).slope


def targets(result: dict[str, Any]) -> list[Target]:
    """What was to be reached."""

    def ratio(name: str, other: str, grid: Size) -> float:
        return median(result, name, grid) / median(result, other, grid)

    few, many = (14, 14), (50, 84)
    return [
        Target(
            "4,200 tokens: time over the released order's",
            ratio("castling", "released", many),
            0.8,
        ),
        Target(
            "4,200 tokens: speed over fused softmax's",
            ratio("softmax", "castling", many),
            5,
            least=True,
        ),
        Target(
            "196 tokens: time over fused softmax's",
            ratio("castling", "softmax", few),
            1,
        ),
        *(
            Target(
                f"4,200 tokens, {name}: time over the released form's",
                ratio(name, "castling", many),
                1.05,
            )
            for name in ("landmarks", "4x4 landmarks")
        ),
        Target("slope of log time over log tokens, from 1,024 on", slope(result), 1.1),
    ]


BENCHMARK = Benchmark(
    name="attention",
    contenders={name: Contender(build, tokens) for name, build in LAYERS.items()},
    repeats=REPEATS,
    extra=gemm_throughput,
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
