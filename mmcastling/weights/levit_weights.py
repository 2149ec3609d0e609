"""LeViT: timm, mmpretrain and the original repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mmcastling.checkpoint import CheckpointError
from mmcastling.models import CastlingLeViT
from mmcastling.weights.dialect import Dialect, Names
from mmcastling.weights.family import (
    Facts,
    Family,
    Options,
    Target,
    in_float32,
    size_option,
)
from mmcastling.weights.levit_heads import Heads, refit_attention
from mmcastling.weights.source import Container

_HEAD = "classifier"
_INDICES = {r".*attention_bias_idxs": "indices, which follow from the image size"}


def _regroup_timm(names: Iterable[str]) -> Names:
    """``stages.s.blocks.b.attn`` to a running number within the stage."""
    pattern = r"stages\.(\d+)\.blocks\.(\d+)\.(attn|mlp)\.(.*)"
    result = {}
    for name in names:
        if match := re.fullmatch(pattern, name):
            stage, block, part, rest = match.groups()
            index = 2 * int(block) + 2 * (stage != "0") + (part == "mlp")
            result[name] = f"stages.{stage}.{index}.block.{rest}"
    return result


TIMM = Dialect(
    name="timm",
    anchor="stem.conv1.linear.weight",
    mark=r"stages\.0\.blocks\.0\.attn\.qkv\.linear\.weight",
    regroup=_regroup_timm,
    renames={
        r"stem\.conv1\.linear\.(.*)": r"patch_embed.patch_embed.0.conv.\1",
        r"stem\.conv1\.bn\.(.*)": r"patch_embed.patch_embed.0.bn.\1",
        r"stem\.conv2\.linear\.(.*)": r"patch_embed.patch_embed.2.conv.\1",
        r"stem\.conv2\.bn\.(.*)": r"patch_embed.patch_embed.2.bn.\1",
        r"stem\.conv3\.linear\.(.*)": r"patch_embed.patch_embed.4.conv.\1",
        r"stem\.conv3\.bn\.(.*)": r"patch_embed.patch_embed.4.bn.\1",
        r"stem\.conv4\.linear\.(.*)": r"patch_embed.patch_embed.6.conv.\1",
        r"stem\.conv4\.bn\.(.*)": r"patch_embed.patch_embed.6.bn.\1",
        r"(stages\.\d+)\.downsample\.attn_downsample\.(q|proj)\.ln\.(.*)": (
            r"\1.0.\2.1.\3"
        ),
        r"(stages\.\d+)\.downsample\.attn_downsample\.(kv\..*|attention_biases)": (
            r"\1.0.\2"
        ),
        r"(stages\.\d+)\.downsample\.mlp\.ln([12])\.(.*)": r"\1.1.block.linear\2.\3",
        r"(stages\.\d+\.\d+\.block)\.proj\.ln\.(.*)": r"\1.proj.1.\2",
        r"(stages\.\d+\.\d+\.block)\.ln([12])\.(.*)": r"\1.linear\2.\3",
        r"(stages\.\d+\.\d+\.block\.(?:qkv\..*|attention_biases))": r"\1",
    },
    drops={r"head(_dist)?\..*": _HEAD, **_INDICES},
)


def _regroup_original(names: Iterable[str]) -> Names:
    """One running number ``blocks.n`` to stages, each but the first led by a ``kv``."""
    blocks = [m for n in names if (m := re.fullmatch(r"blocks\.(\d+)\.(.*)", n))]
    starts = {int(match[1]) for match in blocks if match[2] == "kv.c.weight"}
    starts = [0, *sorted(starts)]
    result = {}
    for match in blocks:
        block = int(match[1])
        stage = sum(start <= block for start in starts) - 1
        result[match[0]] = f"stages.{stage}.{block - starts[stage]}.{match[2]}"
    return result


ORIGINAL = Dialect(
    name="the original LeViT",
    anchor="patch_embed.0.c.weight",
    mark=r"blocks\.0\.m\.qkv\.c\.weight",
    regroup=_regroup_original,
    renames={
        r"patch_embed\.(\d+)\.c\.(.*)": r"patch_embed.patch_embed.\1.conv.\2",
        r"patch_embed\.(\d+)\.bn\.(.*)": r"patch_embed.patch_embed.\1.bn.\2",
        r"(stages\.\d+\.\d+)\.m\.0\.c\.(.*)": r"\1.block.linear1.linear.\2",
        r"(stages\.\d+\.\d+)\.m\.0\.bn\.(.*)": r"\1.block.linear1.bn.\2",
        r"(stages\.\d+\.\d+)\.m\.2\.c\.(.*)": r"\1.block.linear2.linear.\2",
        r"(stages\.\d+\.\d+)\.m\.2\.bn\.(.*)": r"\1.block.linear2.bn.\2",
        r"(stages\.\d+\.\d+)\.m\.(qkv|proj\.1)\.c\.(.*)": r"\1.block.\2.linear.\3",
        r"(stages\.\d+\.\d+)\.m\.(qkv|proj\.1)\.bn\.(.*)": r"\1.block.\2.bn.\3",
        r"(stages\.\d+\.\d+)\.m\.attention_biases": r"\1.block.attention_biases",
        r"(stages\.\d+\.0)\.(kv|q\.1|proj\.1)\.c\.(.*)": r"\1.\2.linear.\3",
        r"(stages\.\d+\.0)\.(kv|q\.1|proj\.1)\.bn\.(.*)": r"\1.\2.bn.\3",
        r"(stages\.\d+\.0\.attention_biases)": r"\1",
    },
    drops={r"head(_dist)?\..*": _HEAD, **_INDICES},
)

MMPRETRAIN = Dialect(
    name="mmpretrain",
    anchor="patch_embed.patch_embed.0.conv.weight",
    mark=r"stages\.0\.0\.block\.qkv\.linear\.weight",
    renames={r"(.*)": r"\1"},
    drops=_INDICES,
)


class LeViTFamily(Family):
    """LeViT for :class:`~mmcastling.models.CastlingLeViT`."""

    name = "LeViT"
    command = "import_levit.py"
    backbone = CastlingLeViT
    needed = {"embed_dims", "key_dims", "num_heads", "depths"}
    dialects = (TIMM, ORIGINAL, MMPRETRAIN)
    patch = "patch_embed.patch_embed.0.conv.weight"
    stride = 16
    no_place = {
        r".*\.attention_biases": "logit biases, which linear attention cannot have",
        r"norm(\d+|_stem)\..*": "norm of an output",
    }
    new = (r".*\.mixer\..*",)
    resized = r".*\.attention_biases"

    def facts(self, weights: Container) -> Facts:
        stages = sorted({n.split(".")[1] for n in weights if n.startswith("stages.")})
        facts: Facts = {"embed_dims": [], "depths": []}
        for stage in stages:
            last = max(int(n.split(".")[2]) for n in weights if _in(n, stage))
            facts["depths"].append((last + 1) // 2 - (stage != "0"))
            mlp = weights.get(f"stages.{stage}.1.block.linear1.linear.weight")
            facts["embed_dims"].append(None if mlp is None else mlp.shape[1])
        return facts | self._blocks(weights, stages)

    def _blocks(self, weights: Container, stages: list[str]) -> Facts:
        """Heads of the blocks within stages, which castled weights do not show."""
        firsts = [
            f"stages.{stage}.{0 if stage == '0' else 2}.block" for stage in stages
        ]
        if any(f"{block}.attention_biases" not in weights for block in firsts):
            return {}
        heads = [_heads(weights, block) for block in firsts]
        return {
            "num_heads": [h.count for h in heads],
            "key_dims": [h.keys for h in heads],
        }

    def facts_of(self, arch: Mapping[str, Any]) -> Facts:
        names = ("embed_dims", "depths", "num_heads", "key_dims")
        return {name: list(arch[name]) for name in names}

    def options(self, weights: Container, target: Target) -> Options:
        options: Options = dict(arch=target.arch)
        if target.img_size is not None:
            options["img_size"] = size_option(*target.img_size)
        elif target.is_softmax and "stages.0.0.block.attention_biases" in weights:
            table = weights["stages.0.0.block.attention_biases"]
            options["img_size"] = 16 * round(table.shape[1] ** 0.5)
        return options

    def adapt(
        self, weights: Container, target: Target, backbone: nn.Module
    ) -> tuple[Container, Names]:
        weights = {n: _as_linear(n, v) for n, v in in_float32(weights).items()}
        changed: Names = {}
        if target.is_softmax:
            return weights, changed
        for name in [n for n in weights if n.endswith(".attention_biases")]:
            block = name.removesuffix(".attention_biases")
            castled = backbone.get_submodule(block)
            width = castled.mixer.head_dims
            changed |= refit_attention(
                weights,
                block,
                _heads(weights, block),
                Heads(castled.num_heads, width, width),
                target.noise,
            )
        return weights, changed


def _heads(weights: Container, block: str) -> Heads:
    """The published heads of an attention, as its shapes show them."""
    count = weights[f"{block}.attention_biases"].shape[0]
    within = f"{block}.qkv.linear.weight" in weights
    needed = [f"{block}.proj.1.linear.weight"]
    needed.append(f"{block}.{'qkv' if within else 'q.1'}.linear.weight")
    if missing := [name for name in needed if name not in weights]:
        raise CheckpointError(f"the weights are not complete: no {', '.join(missing)}")
    proj, rows = (weights[name] for name in needed)
    values, keys = proj.shape[1] // count, rows.shape[0] // count
    return Heads(count, (keys - values) // 2 if within else keys, values)


def _in(name: str, stage: str) -> bool:
    return name.startswith(f"stages.{stage}.")


def _as_linear(name: str, value: Tensor) -> Tensor:
    """A linear layer's weight; variants for phones have 1x1 convolutions instead."""
    is_conv = name.endswith(".linear.weight") and value.shape[2:] == (1, 1)
    return value.flatten(1) if is_conv else value
