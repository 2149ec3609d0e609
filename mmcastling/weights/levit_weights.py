"""LeViT: timm, mmpretrain and the original repository."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from torch import nn

from mmcastling.models import CastlingLeViT
from mmcastling.weights.family import (
    Family,
    Library,
    Rules,
    Target,
    count_blocks,
    size_of,
)
from mmcastling.weights.levit_heads import Heads, heads_of, refit_attention
from mmcastling.weights.source import Weights


def _timm_stem(match: re.Match[str]) -> str:
    layer = "conv" if match[2] == "linear" else "bn"
    return f"patch_embed.patch_embed.{2 * int(match[1]) - 2}.{layer}."


def _timm_block(match: re.Match[str]) -> str:
    """A running number within the stage, each but the first led by a subsampling."""
    stage, block, part = match.groups()
    index = 2 * int(block) + 2 * (stage != "0") + (part == "mlp")
    return f"stages.{stage}.{index}.block."


TIMM = Library(
    "timm",
    anchor="stem.conv1.linear.weight",
    mark=r"stages\.0\.blocks\.0\.attn\.qkv\.linear\.weight",
    rules={
        r"^stem\.conv(\d)\.(linear|bn)\.": _timm_stem,
        r"\.downsample\.attn_downsample\.": ".0.",
        r"\.downsample\.mlp\.": ".1.block.",
        r"^stages\.(\d+)\.blocks\.(\d+)\.(attn|mlp)\.": _timm_block,
        r"\.(q|proj)\.ln\.": r".\1.1.",
        r"\.ln([12])\.": r".linear\1.",
    },
)


def _original_rules(names: Iterable[str]) -> Rules:
    """One running number becomes stages, each but the first led by a ``kv``."""
    leaders = (re.fullmatch(r"blocks\.(\d+)\.kv\.c\.weight", name) for name in names)
    starts = [0, *sorted(int(match[1]) for match in leaders if match)]

    def place(match: re.Match[str]) -> str:
        stage = bisect_right(starts, int(match[1])) - 1
        return f"stages.{stage}.{int(match[1]) - starts[stage]}."

    return {
        r"^patch_embed\.(\d+)\.c\.": r"patch_embed.patch_embed.\1.conv.",
        r"^patch_embed\.(\d+)\.bn\.": r"patch_embed.patch_embed.\1.bn.",
        r"^blocks\.(\d+)\.": place,
        r"\.m\.0\.": ".block.linear1.",
        r"\.m\.2\.": ".block.linear2.",
        r"\.m\.": ".block.",
        r"\.c\.": ".linear.",
    }


ORIGINAL = Library(
    "the original LeViT",
    anchor="patch_embed.0.c.weight",
    mark=r"blocks\.0\.m\.qkv\.c\.weight",
    rules=_original_rules,
)
MMPRETRAIN = Library(
    "mmpretrain",
    anchor="patch_embed.patch_embed.0.conv.weight",
    mark=r"stages\.0\.0\.block\.qkv\.linear\.weight",
)


def _sizes(weights: Weights) -> dict[str, Any]:
    stages = range(count_blocks(weights, "stages."))
    mlps = [f"stages.{stage}.1.block.linear1.linear.weight" for stage in stages]
    counts = [count_blocks(weights, f"stages.{stage}.") for stage in stages]
    sizes: dict[str, Any] = {
        "embed_dims": [size_of(weights, mlp, dim=1) for mlp in mlps],
        "depths": [n // 2 - (s > 0) for s, n in zip(stages, counts, strict=True)],
    }
    blocks = [f"stages.{stage}.{2 if stage else 0}.block" for stage in stages]
    if all(f"{block}.attention_biases" in weights for block in blocks):
        heads = [heads_of(weights, block) for block in blocks]
        sizes["num_heads"] = [h.count for h in heads]
        sizes["key_dims"] = [h.keys for h in heads]
    return sizes  # castled weights do not show the heads of the published network


def _options(weights: Weights, target: Target) -> dict[str, Any]:
    positions = size_of(weights, "stages.0.0.block.attention_biases", dim=1)
    if positions and target.is_softmax and target.img_size is None:
        return {"img_size": (16 * round(positions**0.5),) * 2}
    return {}


def _reshape(weights: Weights, target: Target, backbone: nn.Module) -> dict[str, str]:
    for name, value in weights.items():
        # Variants for phones have 1x1 convolutions in place of linear layers.
        if name.endswith(".linear.weight") and value.shape[2:] == (1, 1):
            weights[name] = value.flatten(1)
    changed: dict[str, str] = {}
    if target.is_softmax:
        return changed
    for name in [n for n in weights if n.endswith(".attention_biases")]:
        block = name.removesuffix(".attention_biases")
        castled = backbone.get_submodule(block)
        width = castled.mixer.head_dims
        to = Heads(castled.num_heads, width, width)
        changed |= refit_attention(
            weights, block, heads_of(weights, block), to, target.noise
        )
    return changed


LEVIT = Family(
    name="LeViT",
    backbone=CastlingLeViT,
    libraries=(TIMM, ORIGINAL, MMPRETRAIN),
    patch="patch_embed.patch_embed.0.conv.weight",
    stride=16,
    dropped={
        r".*\.attention_biases": "logit biases, which linear attention cannot have",
        r".*attention_bias_idxs": "indices, which follow from the image size",
        r"norm(\d+|_stem)\..*": "norm of an output",
        r"head(_dist)?\..*": "classifier",
    },
    new=r".*\.mixer\..*",
    sizes=_sizes,
    options=_options,
    reshape=_reshape,
)
