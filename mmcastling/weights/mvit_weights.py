"""MViTv2: timm, mmpretrain and the original repository."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mmcastling.models import CastlingMViT
from mmcastling.weights.family import (
    Family,
    Library,
    Rules,
    Target,
    count_blocks,
    size_of,
)
from mmcastling.weights.source import Weights

LAST = 3  # MViTv2 has four scales, and libraries norm the last one only
ORIGINAL_RULES: Rules = {
    r"^patch_embed\.proj\.": "patch_embed.projection.",
    r"^norm\.": f"norm{LAST}.",
}


def _timm_rules(names: Iterable[str]) -> Rules:
    """``stages.s.blocks.b`` becomes one running number."""
    block = re.compile(r"^stages\.(\d+)\.blocks\.(\d+)\.")
    places = sorted(
        {tuple(map(int, m.groups())) for n in names if (m := block.match(n))}
    )

    def number(match: re.Match[str]) -> str:
        return f"blocks.{places.index(tuple(map(int, match.groups())))}."

    own = {block.pattern: number, r"\.shortcut_proj_attn\.": ".proj."}
    return {**ORIGINAL_RULES, **own}


TIMM = Library(
    "timm",
    anchor="patch_embed.proj.weight",
    mark=r"stages\.0\.blocks\.0\.attn\.pool_q\.weight",
    rules=_timm_rules,
)
ORIGINAL = Library(
    "the original MViTv2",
    anchor="patch_embed.proj.weight",
    mark=r"blocks\.0\.attn\.pool_q\.weight",
    rules=ORIGINAL_RULES,
)
MMPRETRAIN = Library(
    "mmpretrain",
    anchor="patch_embed.projection.weight",
    mark=r"blocks\.0\.attn\.pool_q\.weight",
)
PATCH = "patch_embed.projection.weight"


def _sizes(weights: Weights) -> dict[str, Any]:
    width = weights[PATCH].shape[0]
    grows = [re.fullmatch(r"blocks\.(\d+)\.proj\.weight", name) for name in weights]
    return {
        "embed_dims": width,
        "num_layers": count_blocks(weights, "blocks."),
        "num_heads": width // weights["blocks.0.attn.pool_q.weight"].shape[0],
        "downscale_indices": sorted(int(match[1]) for match in grows if match),
    }


def _options(weights: Weights, target: Target) -> dict[str, Any]:
    options: dict[str, Any] = {}
    sides = [size_of(weights, f"blocks.0.attn.rel_pos_{axis}") for axis in "hw"]
    if all(sides) and target.is_softmax and target.img_size is None:
        options["img_size"] = tuple(4 * (side + 1) // 2 for side in sides)
    if target.in_channels != 3:
        options["in_channels"] = target.in_channels
    if "blocks.0.attn.qkv.bias" not in weights:
        options["qkv_bias"] = False
    normed = {int(n[4]) for n in weights if re.fullmatch(r"norm\d\.weight", n)}
    if normed - {LAST}:
        options["out_indices"] = sorted(normed)
    return options


def _reshape(weights: Weights, target: Target, backbone: nn.Module) -> dict[str, str]:
    changed = {}
    for name, own in backbone.state_dict().items():
        if name.endswith(".attn.pool_out.weight") and name not in weights:
            # A depthwise kernel that passes its centre: the stride alone is left.
            kernel = torch.zeros(own.shape)
            kernel[:, :, own.shape[2] // 2, own.shape[3] // 2] = 1.0
            weights[name] = kernel
            changed[name] = "starts as the published subsampling"
    return changed


MVIT = Family(
    name="MViTv2",
    backbone=CastlingMViT,
    libraries=(TIMM, ORIGINAL, MMPRETRAIN),
    patch=PATCH,
    stride=4,
    dropped={
        r".*\.rel_pos_[hw]": "relative positions, which linear attention cannot have",
        r"head\..*": "classifier",
    },
    new=r".*\.(mixer|pool_out|norm_out)\..*",
    sizes=_sizes,
    options=_options,
    reshape=_reshape,
)
