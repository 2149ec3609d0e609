"""Plain vision transformers: timm, DeiT, MAE, DINO, torchvision, mmpretrain, HF."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from mmcastling.errors import CheckpointError
from mmcastling.models import CastlingViT
from mmcastling.models.position_embedding import (
    fit_position_embedding,
    grid_of_positions,
)
from mmcastling.weights.family import Family, Library, Target, count_blocks, size_of
from mmcastling.weights.source import Weights

TIMM = Library(
    "timm, DeiT, MAE or DINO",  # of which the first releases have timm's names
    anchor="patch_embed.proj.weight",
    mark=r"blocks\.0\.attn\.(qkv|q|q_proj)\.weight",
    rules={
        r"^patch_embed\.proj\.": "patch_embed.projection.",
        r"^norm_pre\.": "pre_norm.",
        r"^norm\.": "ln1.",
        r"^fc_norm\.": "ln2.",
        r"^blocks\.": "layers.",
        r"\.norm([12])\.": r".ln\1.",
        r"\.attn\.([qkv])_proj\.": r".attn.\1.",
        r"\.mlp\.fc1\.": ".ffn.layers.0.0.",
        r"\.mlp\.fc2\.": ".ffn.layers.1.",
        r"\.(?:ls1\.gamma|gamma_1)$": ".attn.gamma1.weight",
        r"\.(?:ls2\.gamma|gamma_2)$": ".ffn.gamma2.weight",
    },
)
TORCHVISION = Library(
    "torchvision",
    anchor="conv_proj.weight",
    mark=r"encoder\.layers\.encoder_layer_0\.self_attention\.(in_proj_|qkv\.)weight",
    rules={
        r"^class_token$": "cls_token",
        r"^encoder\.pos_embedding$": "pos_embed",
        r"^conv_proj\.": "patch_embed.projection.",
        r"^encoder\.ln\.": "ln1.",
        r"^encoder\.layers\.encoder_layer_": "layers.",
        r"\.ln_([12])\.": r".ln\1.",
        r"\.self_attention\.in_proj_": ".attn.qkv.",
        r"\.self_attention\.out_proj\.": ".attn.proj.",
        r"\.self_attention\.": ".attn.",  # once castled
        r"\.mlp\.(?:0|linear_1)\.": ".ffn.layers.0.0.",  # linear_1: first releases
        r"\.mlp\.(?:3|linear_2)\.": ".ffn.layers.1.",
    },
)
MMPRETRAIN = Library(
    "mmpretrain",
    anchor="patch_embed.projection.weight",
    mark=r"layers\.0\.attn\.qkv\.weight",
)
# transformers 5 has other names in memory and still writes the older ones to disk.
TRANSFORMERS = Library(
    "Hugging Face transformers",
    anchor="embeddings.patch_embeddings.projection.weight",
    mark=r"(encoder\.layer\.0\.attention\.attention\.query"
    r"|layers\.0\.attention\.q_proj)\.weight",
    rules={
        r"^embeddings\.patch_embeddings\.": "patch_embed.",
        r"^embeddings\.position_embeddings$": "pos_embed",
        r"^embeddings\.distillation_token$": "dist_token",
        r"^embeddings\.": "",
        r"^layernorm\.": "ln1.",
        r"^encoder\.layer\.": "layers.",
        r"\.(?:layernorm_before|norm1)\.": ".ln1.",
        r"\.(?:layernorm_after|norm2)\.": ".ln2.",
        r"\.layer_scale1\.lambda1$": ".attn.gamma1.weight",
        r"\.layer_scale2\.lambda1$": ".ffn.gamma2.weight",
        r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.": r".attn.\1.",
        r"\.attention\.([qkv])_proj\.": r".attn.\1.",
        r"\.attention\.(?:output\.dense|o_proj)\.": ".attn.proj.",
        r"\.(?:intermediate\.dense|mlp\.fc1)\.": ".ffn.layers.0.0.",
        r"\.(?:output\.dense|mlp\.fc2)\.": ".ffn.layers.1.",
    },
)
PATCH = "patch_embed.projection.weight"


def _sizes(weights: Weights) -> dict[str, Any]:
    return {
        "embed_dims": weights[PATCH].shape[0],
        "num_layers": count_blocks(weights, "layers."),
        "feedforward_channels": size_of(weights, "layers.0.ffn.layers.0.0.weight"),
    }


def _options(weights: Weights, target: Target) -> dict[str, Any]:
    height, width = weights[PATCH].shape[2:]
    if height != width:
        raise CheckpointError(
            f"patches of {height}x{width} pixels: only square ones are supported"
        )
    if "pos_embed" not in weights:
        raise CheckpointError(
            "the file has no position embedding (pos_embed), which the backbone needs"
        )
    options: dict[str, Any] = {"patch_size": height}
    if target.img_size is None:
        grid, _ = grid_of_positions(weights["pos_embed"], _count_tokens(weights))
        options["img_size"] = (grid[0] * height, grid[1] * height)
    if target.dist_token:
        if _count_tokens(weights) < 2:
            raise CheckpointError(
                "the file has no distillation token beside a class token: leave "
                "--dist-token out"
            )
        options["with_dist_token"] = True
    if target.in_channels != 3:
        options["in_channels"] = target.in_channels
    if not {"layers.0.attn.qkv.bias", "layers.0.attn.q.bias"} & weights.keys():
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


def _count_tokens(weights: Weights) -> int:
    return len({"cls_token", "dist_token"} & weights.keys())


def _reshape(weights: Weights, target: Target, backbone: nn.Module) -> dict[str, str]:
    changed = fuse_qkv(weights)
    weights["pos_embed"], note = fit_position_embedding(
        weights["pos_embed"],
        _count_tokens(weights),
        tuple(backbone.patch_resolution),
        backbone.num_extra_tokens,
    )
    return changed | ({"pos_embed": note} if note else {})


def fuse_qkv(weights: Weights) -> dict[str, str]:
    """Join ``layers.0.attn.q.weight`` and so on to ``qkv``, in place, with a note."""
    found = [re.fullmatch(r"(.*\.attn\.)[qkv]\.(weight|bias)", n) for n in weights]
    changed = {}
    for stem, kind in dict.fromkeys(match.groups() for match in found if match):
        parts = [f"{stem}{part}.{kind}" for part in "qkv"]
        if missing := [part for part in parts if part not in weights]:
            alone = ", ".join(part for part in parts if part in weights)
            raise CheckpointError(
                f"{alone} stands alone: {', '.join(missing)} is not in the file"
            )
        weights[f"{stem}qkv.{kind}"] = torch.cat([weights.pop(part) for part in parts])
        changed[f"{stem}qkv.{kind}"] = "joined from q, k and v"
    return changed


VIT = Family(
    name="ViT",
    backbone=CastlingViT,
    libraries=(TIMM, TORCHVISION, MMPRETRAIN, TRANSFORMERS),
    patch=PATCH,
    stride=None,
    dropped={
        r"dist_token": "distillation token (kept by --dist-token)",
        r"(head|heads|head_dist|pre_logits|pooler)\..*": "classifier",
        r"mask_token|decoder_.*": "decoder of masked image modelling",
    },
    new=r".*\.attn\.(?!qkv|proj|gamma1).*",
    sizes=_sizes,
    options=_options,
    reshape=_reshape,
)
