"""Plain vision transformers: timm, DeiT, MAE, DINO, torchvision, mmpretrain, HF."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from mmpretrain.models.utils import resize_pos_embed
from torch import Tensor, nn

from mmcastling.checkpoint import CheckpointError
from mmcastling.models import CastlingViT
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
_MAE = "decoder of masked image modelling"

# timm's names, which are those of the first releases of DeiT, MAE and DINO.
TIMM = Dialect(
    name="timm, DeiT, MAE or DINO",
    anchor="patch_embed.proj.weight",
    mark=r"blocks\.0\.attn\.(qkv|q|q_proj)\.weight",
    unless=r"blocks\.0\.attn\.pool_q\.weight",  # MViTv2's
    renames={
        r"(cls_token|dist_token|pos_embed)": r"\1",
        rf"patch_embed\.proj\.{_WB}": r"patch_embed.projection.\1",
        rf"norm_pre\.{_WB}": r"pre_norm.\1",
        rf"blocks\.(\d+)\.norm([12])\.{_WB}": r"layers.\1.ln\2.\3",
        rf"blocks\.(\d+)\.attn\.(qkv|proj)\.{_WB}": r"layers.\1.attn.\2.\3",
        r"blocks\.(\d+)\.attn\.mixer\.(.*)": r"layers.\1.attn.mixer.\2",
        rf"blocks\.(\d+)\.attn\.([qkv])(?:_proj)?\.{_WB}": r"layers.\1.attn.\2.\3",
        rf"blocks\.(\d+)\.mlp\.fc1\.{_WB}": r"layers.\1.ffn.layers.0.0.\2",
        rf"blocks\.(\d+)\.mlp\.fc2\.{_WB}": r"layers.\1.ffn.layers.1.\2",
        r"blocks\.(\d+)\.(?:ls1\.gamma|gamma_1)": r"layers.\1.attn.gamma1.weight",
        r"blocks\.(\d+)\.(?:ls2\.gamma|gamma_2)": r"layers.\1.ffn.gamma2.weight",
        rf"norm\.{_WB}": r"ln1.\1",
        rf"fc_norm\.{_WB}": r"ln2.\1",
    },
    drops={
        r"(head|head_dist|pre_logits)\..*": _HEAD,
        r"(mask_token|decoder_.*)": _MAE,
    },
)

TORCHVISION = Dialect(
    name="torchvision",
    anchor="conv_proj.weight",
    mark=r"encoder\.layers\.encoder_layer_0\.self_attention\.in_proj_weight",
    renames={
        r"class_token": "cls_token",
        r"encoder\.pos_embedding": "pos_embed",
        rf"conv_proj\.{_WB}": r"patch_embed.projection.\1",
        rf"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.{_WB}": (
            r"layers.\1.ln\2.\3"
        ),
        rf"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_{_WB}": (
            r"layers.\1.attn.qkv.\2"
        ),
        rf"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.{_WB}": (
            r"layers.\1.attn.proj.\2"
        ),
        # Checkpoints of its first releases say linear_1 and linear_2.
        rf"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.{_WB}": (
            r"layers.\1.ffn.layers.0.0.\2"
        ),
        rf"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.{_WB}": (
            r"layers.\1.ffn.layers.1.\2"
        ),
        rf"encoder\.ln\.{_WB}": r"ln1.\1",
    },
    drops={r"heads\..*": _HEAD},
)

MMPRETRAIN = Dialect(
    name="mmpretrain",
    anchor="patch_embed.projection.weight",
    mark=r"layers\.0\.attn\.qkv\.weight",
    renames={
        # Ours of earlier releases.
        r"(.*\.attn)\.(local_conv\..*|directions|scale)": r"\1.mixer.\2",
        r"(.*)": r"\1",
    },
    drops={r"mask_token": _MAE},
)

_HF_SHARED: Names = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.distillation_token": "dist_token",
    r"embeddings\.position_embeddings": "pos_embed",
    rf"embeddings\.patch_embeddings\.projection\.{_WB}": (r"patch_embed.projection.\1"),
    rf"layernorm\.{_WB}": r"ln1.\1",
}
_HF_DROPS: Names = {
    r"pooler\..*": _HEAD,
    r"embeddings\.mask_token": _MAE,
}

HF = Dialect(
    name="Hugging Face transformers",
    anchor="embeddings.patch_embeddings.projection.weight",
    mark=r"encoder\.layer\.0\.attention\.attention\.query\.weight",
    renames={
        **_HF_SHARED,
        rf"encoder\.layer\.(\d+)\.layernorm_before\.{_WB}": r"layers.\1.ln1.\2",
        rf"encoder\.layer\.(\d+)\.layernorm_after\.{_WB}": r"layers.\1.ln2.\2",
        rf"encoder\.layer\.(\d+)\.attention\.attention\.([qkv])"
        rf"(?:uery|ey|alue)\.{_WB}": r"layers.\1.attn.\2.\3",
        rf"encoder\.layer\.(\d+)\.attention\.output\.dense\.{_WB}": (
            r"layers.\1.attn.proj.\2"
        ),
        rf"encoder\.layer\.(\d+)\.intermediate\.dense\.{_WB}": (
            r"layers.\1.ffn.layers.0.0.\2"
        ),
        rf"encoder\.layer\.(\d+)\.output\.dense\.{_WB}": r"layers.\1.ffn.layers.1.\2",
    },
    drops=_HF_DROPS,
)

# transformers 5 has other names in memory and still writes the older ones to disk.
HF_IN_MEMORY = Dialect(
    name="Hugging Face transformers, release 5",
    anchor="embeddings.patch_embeddings.projection.weight",
    mark=r"layers\.0\.attention\.q_proj\.weight",
    renames={
        **_HF_SHARED,
        rf"layers\.(\d+)\.layernorm_before\.{_WB}": r"layers.\1.ln1.\2",
        rf"layers\.(\d+)\.layernorm_after\.{_WB}": r"layers.\1.ln2.\2",
        rf"layers\.(\d+)\.attention\.([qkv])_proj\.{_WB}": r"layers.\1.attn.\2.\3",
        rf"layers\.(\d+)\.attention\.o_proj\.{_WB}": r"layers.\1.attn.proj.\2",
        rf"layers\.(\d+)\.mlp\.fc1\.{_WB}": r"layers.\1.ffn.layers.0.0.\2",
        rf"layers\.(\d+)\.mlp\.fc2\.{_WB}": r"layers.\1.ffn.layers.1.\2",
    },
    drops=_HF_DROPS,
)


class ViTFamily(Family):
    """Plain vision transformers for :class:`~mmcastling.models.CastlingViT`."""

    name = "ViT"
    command = "import_vit.py"
    backbone = CastlingViT
    needed = {"embed_dims", "num_layers", "num_heads", "feedforward_channels"}
    dialects = (TIMM, TORCHVISION, MMPRETRAIN, HF, HF_IN_MEMORY)
    patch = "patch_embed.projection.weight"
    stride = None
    no_place = {r"dist_token": "distillation token (kept by --dist-token)"}
    new = (r".*\.local_conv\.weight", r".*\.attn\.(?!qkv|proj|gamma1).*")
    resized = r"pos_embed"

    def facts(self, weights: Container) -> Facts:
        hidden = weights.get("layers.0.ffn.layers.0.0.weight")
        return {
            "embed_dims": weights[self.patch].shape[0],
            "num_layers": count_blocks(weights, r"layers\.(\d+)\."),
            "feedforward_channels": None if hidden is None else hidden.shape[0],
        }

    def facts_of(self, arch: Mapping[str, Any]) -> Facts:
        return {
            name: arch[name]
            for name in ("embed_dims", "num_layers", "feedforward_channels")
        }

    def options(self, weights: Container, target: Target) -> Options:
        height, width = weights[self.patch].shape[2:]
        if height != width:
            raise CheckpointError(
                f"patches of {height}x{width} pixels: only square ones are supported"
            )
        img_size = target.img_size
        if img_size is None:
            rows, columns = source_grid(weights, None)
            img_size = (rows * height, columns * height)
        options: Options = dict(
            arch=target.arch, img_size=size_option(*img_size), patch_size=height
        )
        if target.dist_token:
            if not {"cls_token", "dist_token"} <= set(weights):
                raise CheckpointError(
                    "the file has no distillation token beside a class token: leave "
                    "--dist-token out"
                )
            options["with_dist_token"] = True
        if target.in_channels != 3:
            options["in_channels"] = target.in_channels
        if "layers.0.attn.qkv.bias" not in weights and (
            "layers.0.attn.q.bias" not in weights
        ):
            options["qkv_bias"] = False
        if "layers.0.attn.gamma1.weight" in weights:
            options["layer_scale_init_value"] = 1e-5  # the weights replace it
        if "pre_norm.weight" in weights:
            options["pre_norm"] = True
        if "cls_token" not in weights:
            options.update(with_cls_token=False, out_type="featmap")
        if "ln2.weight" in weights:
            options.update(out_type="avg_featmap", final_norm="ln1.weight" in weights)
        return options

    def adapt(
        self, weights: Container, target: Target, backbone: nn.Module
    ) -> tuple[Container, Names]:
        weights, changed = fuse_qkv(in_float32(weights))
        if "pos_embed" in weights:
            wanted = backbone.num_extra_tokens
            table, note = fit_pos_embed(
                weights, tuple(backbone.patch_resolution), wanted
            )
            weights["pos_embed"] = table
            if note:
                changed["pos_embed"] = note
        return weights, changed


def fuse_qkv(weights: Container) -> tuple[Container, Names]:
    """Join separate projections ``q``, ``k``, ``v`` to one ``qkv``, in this order.

    Args:
        weights: Weights with names such as ``layers.0.attn.q.weight``.

    Returns:
        The weights, and a note for each that was joined.

    Raises:
        CheckpointError: If one of the three is missing.
    """
    fused, changed = dict(weights), {}
    for name in weights:
        match = re.fullmatch(r"(.*\.attn\.)[qkv]\.(weight|bias)", name)
        if not match or f"{match[1]}qkv.{match[2]}" in fused:
            continue
        parts = [f"{match[1]}{part}.{match[2]}" for part in "qkv"]
        if missing := [part for part in parts if part not in weights]:
            raise CheckpointError(
                f"{name} stands alone: {', '.join(missing)} is not in the file"
            )
        whole = f"{match[1]}qkv.{match[2]}"
        fused[whole] = torch.cat([fused.pop(part) for part in parts])
        changed[whole] = "joined from q, k and v"
    return fused, changed


def source_grid(weights: Container, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid ``(H, W)`` of a position embedding, without class tokens.

    Args:
        weights: Weights with ``pos_embed`` ``(1, N, C)``.
        grid: The grid that is wanted: if it has the right number of tokens, it is taken
            to be the source's. Otherwise that must be square.

    Raises:
        CheckpointError: If there is no such grid.
    """
    if "pos_embed" not in weights:
        raise CheckpointError(
            "the file has no position embedding (pos_embed), which the backbone needs"
        )
    if weights["pos_embed"].ndim != 3:
        raise CheckpointError(
            f"the position embedding is {tuple(weights['pos_embed'].shape)}, expected "
            "(1, tokens, channels)"
        )
    tokens = weights["pos_embed"].shape[1]
    extra = sum(name in weights for name in ("cls_token", "dist_token"))
    # timm can leave class tokens without a position.
    for count in (tokens - extra, tokens):
        if grid is not None and math.prod(grid) == count:
            return grid
        side = math.isqrt(count)
        if count > 0 and side * side == count:
            return side, side
    raise CheckpointError(
        f"the position embedding has {tokens} positions, of which {extra} belong to "
        "class tokens: the rest is no square, and only a square grid can be resized. "
        "For another one give the source's own --img-size H W"
    )


def fit_pos_embed(
    weights: Container, grid: tuple[int, int], wanted: int = 1
) -> tuple[Tensor, str]:
    """Resize a position embedding, and fit it to the number of class tokens.

    Args:
        weights: Weights with ``pos_embed`` ``(1, N, C)``, and the class tokens that
            have positions in it.
        grid: The grid ``(H, W)`` that is wanted.
        wanted: The backbone's number of class tokens: 2 with a distillation token,
            whose position is the second. Defaults to 1.

    Returns:
        The embedding, and what was done to it.

    Raises:
        CheckpointError: If the source's grid is not known.
    """
    table = weights["pos_embed"]
    own = source_grid(weights, grid)
    extra = table.shape[1] - math.prod(own)
    notes = []
    if extra == 2 and wanted < 2:
        table = torch.cat((table[:, :1], table[:, 2:]), dim=1)
        extra = 1
        notes.append("the distillation token's position removed")
    elif extra == 0 and "cls_token" in weights:
        zeros = torch.zeros_like(table[:, :1]).expand(-1, wanted, -1)
        table = torch.cat((zeros, table), dim=1)
        extra = wanted
        notes.append("zero added for class tokens, which have no position")
    if own != grid:
        table = resize_pos_embed(table, own, grid, "bicubic", extra)
        notes.append(f"resized from {own[0]}x{own[1]} to {grid[0]}x{grid[1]}")
    return table, ", ".join(notes)
