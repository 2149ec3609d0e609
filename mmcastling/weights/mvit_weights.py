"""MViTv2: timm, mmpretrain and the original repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mmcastling.models import CastlingMViT
from mmcastling.weights.dialect import Dialect, Names
from mmcastling.weights.family import (
    Facts,
    Family,
    Options,
    Target,
    count_blocks,
    in_float32,
    size_option,
)
from mmcastling.weights.source import Container

_WB = r"(weight|bias)"
_HEAD = "classifier"
_LAST = 3  # MViTv2 has four scales, and libraries norm the last one only

_BLOCK: Names = {
    rf"blocks\.(\d+)\.norm([12])\.{_WB}": r"blocks.\1.norm\2.\3",
    rf"blocks\.(\d+)\.attn\.(qkv|proj|norm_[qkv])\.{_WB}": r"blocks.\1.attn.\2.\3",
    r"blocks\.(\d+)\.attn\.(pool_[qkv]\.weight|rel_pos_[hw])": r"blocks.\1.attn.\2",
    rf"blocks\.(\d+)\.mlp\.fc([12])\.{_WB}": r"blocks.\1.mlp.fc\2.\3",
    rf"blocks\.(\d+)\.(?:proj|shortcut_proj_attn)\.{_WB}": r"blocks.\1.proj.\2",
    rf"patch_embed\.proj\.{_WB}": r"patch_embed.projection.\1",
    rf"norm\.{_WB}": rf"norm{_LAST}.\1",
}


def _regroup_timm(names: Iterable[str]) -> Names:
    """``stages.s.blocks.b`` to one running number."""
    pattern = r"stages\.(\d+)\.blocks\.(\d+)\.(.*)"
    blocks = [match for name in names if (match := re.fullmatch(pattern, name))]
    order = sorted({(int(match[1]), int(match[2])) for match in blocks})
    return {
        match[0]: f"blocks.{order.index((int(match[1]), int(match[2])))}.{match[3]}"
        for match in blocks
    }


TIMM = Dialect(
    name="timm",
    anchor="patch_embed.proj.weight",
    mark=r"stages\.0\.blocks\.0\.attn\.pool_q\.weight",
    regroup=_regroup_timm,
    renames=_BLOCK,
    drops={r"head\..*": _HEAD},
)

ORIGINAL = Dialect(
    name="the original MViTv2",
    anchor="patch_embed.proj.weight",
    mark=r"blocks\.0\.attn\.pool_q\.weight",
    renames=_BLOCK,
    drops={r"head\..*": _HEAD},
)

MMPRETRAIN = Dialect(
    name="mmpretrain",
    anchor="patch_embed.projection.weight",
    mark=r"blocks\.0\.attn\.pool_q\.weight",
    renames={r"(.*)": r"\1"},
)


class MViTFamily(Family):
    """MViTv2 for :class:`~mmcastling.models.CastlingMViT`."""

    name = "MViTv2"
    command = "import_mvit.py"
    backbone = CastlingMViT
    needed = {"embed_dims", "num_layers", "num_heads", "downscale_indices"}
    dialects = (TIMM, ORIGINAL, MMPRETRAIN)
    patch = "patch_embed.projection.weight"
    stride = 4
    no_place = {
        r".*\.rel_pos_[hw]": "relative positions, which linear attention cannot have"
    }
    new = (r".*\.mixer\..*", r".*\.(pool|norm)_out\..*")
    resized = r".*\.rel_pos_[hw]"

    def facts(self, weights: Container) -> Facts:
        grows = [re.fullmatch(r"blocks\.(\d+)\.proj\.weight", name) for name in weights]
        head = weights["blocks.0.attn.pool_q.weight"].shape[0]
        width = weights[self.patch].shape[0]
        return {
            "embed_dims": width,
            "num_layers": count_blocks(weights, r"blocks\.(\d+)\."),
            "num_heads": width // head,
            "downscale_indices": sorted(int(match[1]) for match in grows if match),
        }

    def facts_of(self, arch: Mapping[str, Any]) -> Facts:
        return {**arch, "downscale_indices": sorted(arch["downscale_indices"])}

    def options(self, weights: Container, target: Target) -> Options:
        options: Options = dict(arch=target.arch)
        if target.img_size is not None:
            options["img_size"] = size_option(*target.img_size)
        elif target.is_softmax and "blocks.0.attn.rel_pos_h" in weights:
            sides = [weights[f"blocks.0.attn.rel_pos_{axis}"].shape[0] for axis in "hw"]
            options["img_size"] = size_option(*(4 * (side + 1) // 2 for side in sides))
        if target.in_channels != 3:
            options["in_channels"] = target.in_channels
        if "blocks.0.attn.qkv.bias" not in weights:
            options["qkv_bias"] = False
        normed = {int(n[4]) for n in weights if re.fullmatch(r"norm\d\.weight", n)}
        if normed - {_LAST}:
            options["out_indices"] = sorted(normed)
        return options

    def adapt(
        self, weights: Container, target: Target, backbone: nn.Module
    ) -> tuple[Container, Names]:
        weights, changed = in_float32(weights), {}
        for name, own in backbone.state_dict().items():
            if name.endswith(".attn.pool_out.weight") and name not in weights:
                weights[name] = centre_taps(own)
                changed[name] = "starts as the published subsampling"
        return weights, changed


def centre_taps(like: torch.Tensor) -> torch.Tensor:
    """Depthwise kernels ``(C, 1, k, k)`` that pass the centre, so that a stride drops
    rows and columns and nothing else."""
    kernel = torch.zeros(like.shape)
    kernel[:, :, like.shape[2] // 2, like.shape[3] // 2] = 1.0
    return kernel
