"""CastlingViT: mmpretrain's plain vision transformer with castling attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmcv.cnn.bricks.drop import build_dropout
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import build_norm_layer, resize_pos_embed
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmcastling.attention import build_attention
from mmcastling.backbones.conv_ffn import ConvFFN
from mmcastling.backbones.stem import ConvStem
from mmcastling.registry import MODELS

Grid = tuple[int, int]


class CastlingEncoderLayer(TransformerEncoderLayer):
    """A pre-norm encoder layer whose attention and MLP may know the grid of tokens.

    Args:
        attention: Options of the attention, see
            :func:`mmcastling.attention.build_attention`. Defaults to None (castling).
        ffn_conv: Kernel size of the depthwise convolution in the MLP, 0 for none.
            Defaults to 0.
        deploy: Build the pruned attention. Defaults to False.
        **kwargs: Arguments of mmpretrain's ``TransformerEncoderLayer``.
    """

    def __init__(
        self,
        attention: dict[str, Any] | None = None,
        ffn_conv: int = 0,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        embed_dims = self.embed_dims
        drop_rate = kwargs.get("drop_rate", 0.0)
        drop_path = dict(
            type="DropPath", drop_prob=float(kwargs.get("drop_path_rate", 0.0))
        )
        layer_scale = kwargs.get("layer_scale_init_value", 0.0)
        self.attn = build_attention(
            attention,
            deploy=deploy,
            embed_dims=embed_dims,
            num_heads=kwargs["num_heads"],
            qkv_bias=kwargs.get("qkv_bias", True),
            layer_scale_init_value=layer_scale,
            proj_drop=drop_rate,
        )
        self.drop_path = build_dropout(drop_path)
        if ffn_conv:
            self.ffn = ConvFFN(
                embed_dims,
                kwargs["feedforward_channels"],
                kernel_size=ffn_conv,
                ffn_drop=drop_rate,
                dropout_layer=drop_path,
                act_cfg=kwargs.get("act_cfg", dict(type="GELU")),
                layer_scale_init_value=layer_scale,
            )

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Apply to tokens ``(B, N, C)``, the last ``H * W`` of which fill ``grid``."""
        x = x + self.drop_path(self.attn(self.ln1(x), grid))
        options = {"grid": grid} if isinstance(self.ffn, ConvFFN) else {}
        return self.ffn(self.ln2(x), identity=x, **options)


@MODELS.register_module()
@MMPRETRAIN_MODELS.register_module()
class CastlingViT(VisionTransformer):
    """Vision transformer with linear-angular attention and a vanishing softmax branch.

    From "Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular
    Attention at Vision Transformer Inference" (You et al., CVPR 2023). Runs at any
    image size, square or not, and is built from mmpretrain, mmdet and mmseg configs as
    ``mmcastling.CastlingViT`` or ``mmpretrain.CastlingViT``. The names of parameters
    are those of mmpretrain's ``VisionTransformer``, so its weights load.

    Args:
        arch: ``'nano'`` (tests and demos), ``'tiny'``, ``'small'``, ``'base'`` (DeiT's
            sizes), or a dict with ``embed_dims``, ``num_layers``, ``num_heads`` and
            ``feedforward_channels``. Defaults to ``'small'``.
        img_size: Usual image size, for the position embedding; an int or ``(H, W)``.
            Defaults to 224.
        patch_size: Stride of the tokens. Defaults to 16.
        out_indices: Layers whose output is returned, negative ones from the end. Each
            has its own norm, the last layer's being ``ln1``. Defaults to -1.
        attention: Options of the attention: ``type`` (``'castling'``,
            ``'linear_angular'``, ``'softmax'``) and its arguments, such as
            ``local_conv`` and ``mask_threshold``. Defaults to None (castling).
        ffn_conv: Kernel size of the depthwise convolution in each MLP (3, 5, 7), or 0
            for none. Defaults to 0.
        stem: ``'patch'`` for one convolution of the patch's size, ``'conv'`` for steps
            of stride 2. Defaults to ``'patch'``.
        with_cp: Recompute layers in the backward pass to save memory. Defaults to
            False.
        deploy: Build the pruned graph. Defaults to False.
        **kwargs: Further arguments of mmpretrain's ``VisionTransformer``, such as
            ``out_type``, ``with_cls_token``, ``drop_path_rate``, ``frozen_stages`` and
            ``init_cfg``.

    Raises:
        ValueError: If an option or its value is not known.
    """

    arch_zoo = {
        "nano": {
            "embed_dims": 128,
            "num_layers": 4,
            "num_heads": 4,
            "feedforward_channels": 128 * 4,
        },
        "tiny": VisionTransformer.arch_zoo["deit-tiny"],
        "small": VisionTransformer.arch_zoo["deit-small"],
        "base": VisionTransformer.arch_zoo["deit-base"],
    }

    def __init__(
        self,
        arch: str | dict[str, int] = "small",
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        attention: dict[str, Any] | None = None,
        ffn_conv: int = 0,
        stem: str = "patch",
        with_cp: bool = False,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        arch = self._check_arch(arch)
        if ffn_conv not in (0, 3, 5, 7):
            raise ValueError(
                f"ffn_conv {ffn_conv!r} must be 0 (no convolution), 3, 5 or 7"
            )
        if stem not in ("patch", "conv"):
            raise ValueError(f"stem {stem!r} is not known: choose 'patch' or 'conv'")
        if isinstance(img_size, Sequence):
            img_size = tuple(img_size)
        indices = [out_indices] if isinstance(out_indices, int) else list(out_indices)
        num_layers = arch["num_layers"]
        for index in indices:
            if not -num_layers <= index < num_layers:
                raise ValueError(
                    f"out_indices {out_indices!r}: {index} is not a layer; there are "
                    f"{num_layers}, numbered 0 to {num_layers - 1} or -{num_layers} "
                    "to -1"
                )
        indices = sorted({index % num_layers for index in indices})
        try:
            super().__init__(
                arch=arch,
                img_size=img_size,
                patch_size=patch_size,
                in_channels=in_channels,
                out_indices=indices,
                **kwargs,
            )
        except TypeError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error

        if stem == "conv":
            self.patch_embed = ConvStem(
                in_channels, self.embed_dims, patch_size, self.img_size
            )
            if self.patch_embed.init_out_size != tuple(self.patch_resolution):
                raise ValueError(
                    f"img_size {self.img_size} is not a multiple of patch_size "
                    f"{patch_size}"
                )
        self.patch_size = patch_size
        self.with_cp = with_cp
        self.deploy = deploy
        self._castle_layers(attention, ffn_conv, kwargs)

        norm_cfg = kwargs.get("norm_cfg", dict(type="LN", eps=1e-6))
        for index in indices:
            if index != num_layers - 1:  # the last layer's norm is ln1
                norm = build_norm_layer(norm_cfg, self.embed_dims)
                self.add_module(f"out_norm{index}", norm)
        if self.frozen_stages > 0:
            self._freeze_stages()

    def _check_arch(self, arch: str | dict[str, int]) -> dict[str, int]:
        needed = {"embed_dims", "num_layers", "num_heads", "feedforward_channels"}
        if isinstance(arch, str):
            if arch.lower() not in self.arch_zoo:
                raise ValueError(
                    f"arch {arch!r} is not known: choose one of "
                    f"{list(self.arch_zoo)}, or a dict with {sorted(needed)}"
                )
            return self.arch_zoo[arch.lower()]
        if missing := needed - set(arch):
            raise ValueError(f"arch {arch!r} lacks {sorted(missing)}")
        return dict(arch)

    def _castle_layers(
        self, attention: dict[str, Any] | None, ffn_conv: int, kwargs: dict[str, Any]
    ) -> None:
        drop_path_rates = np.linspace(
            0, kwargs.get("drop_path_rate", 0.0), self.num_layers
        ).tolist()
        shared = dict(
            embed_dims=self.embed_dims,
            num_heads=self.arch_settings["num_heads"],
            feedforward_channels=self.arch_settings["feedforward_channels"],
            layer_scale_init_value=kwargs.get("layer_scale_init_value", 0.0),
            drop_rate=kwargs.get("drop_rate", 0.0),
            qkv_bias=kwargs.get("qkv_bias", True),
            norm_cfg=kwargs.get("norm_cfg", dict(type="LN", eps=1e-6)),
            attention=attention,
            ffn_conv=ffn_conv,
            deploy=self.deploy,
        )
        per_layer = kwargs.get("layer_cfgs", {})
        if isinstance(per_layer, dict):
            per_layer = [per_layer] * self.num_layers
        for i, options in enumerate(per_layer):
            options = {**shared, "drop_path_rate": drop_path_rates[i], **options}
            self.layers[i] = CastlingEncoderLayer(**options)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract features.

        Args:
            x: Images ``(B, in_channels, H, W)`` of any size not below a patch.

        Returns:
            One output per entry of ``out_indices``, of the form ``out_type`` names.

        Raises:
            ValueError: If the image is smaller than a patch.
        """
        if min(x.shape[-2:]) < self.patch_size:
            raise ValueError(
                f"image of {x.shape[-2]}x{x.shape[-1]} pixels is smaller than a patch "
                f"of {self.patch_size}x{self.patch_size}; enlarge it"
            )
        x, grid = self.patch_embed(x)  # (B, H*W, C)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + resize_pos_embed(
            self.pos_embed,
            self.patch_resolution,
            grid,
            mode=self.interpolate_mode,
            num_extra_tokens=self.num_extra_tokens,
        )
        x = self.pre_norm(self.drop_after_pos(x))

        outs = []
        for i, layer in enumerate(self.layers):
            if self.with_cp and x.requires_grad:
                x = checkpoint(layer, x, grid, use_reentrant=False)
            else:
                x = layer(x, grid)
            if i in self.out_indices:
                outs.append(self._format_output(self._norm_output(i, x), grid))
        return tuple(outs)

    def _norm_output(self, index: int, x: Tensor) -> Tensor:
        if index != self.num_layers - 1:
            return getattr(self, f"out_norm{index}")(x)
        return self.ln1(x) if self.final_norm else x

    def switch_to_deploy(self) -> None:
        """Prune the auxiliary branch of every layer. Idempotent."""
        for layer in self.layers:
            switch = getattr(layer.attn, "switch_to_deploy", None)
            if switch is not None:
                switch()
        self.deploy = True

    def train(self, mode: bool = True) -> CastlingViT:
        """Set the mode; frozen stages stay in evaluation. Returns the backbone."""
        super().train(mode)
        if mode and self.frozen_stages > 0:
            self._freeze_stages()
        return self

    def eval(self) -> CastlingViT:
        """Set evaluation mode. Returns the backbone."""
        return self.train(False)
