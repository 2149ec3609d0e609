"""CastlingMViT: mmpretrain's MViTv2 with castling attention, at any image size."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mmpretrain.models.backbones import MViT
from mmpretrain.models.backbones.mvit import MultiScaleBlock
from mmpretrain.models.utils import resize_pos_embed
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmcastling.errors import OptionError
from mmcastling.models.common import (
    CastlingBackbone,
    TokensAt,
    check_arch,
    check_ffn_conv,
    check_frozen_stages,
    check_image,
    check_out_indices,
    freeze,
    image_size,
)
from mmcastling.models.mvit_blocks import CastlingMultiScaleBlock
from mmcastling.registry import MODELS


@MODELS.register_module()
@MMPRETRAIN_MODELS.register_module()
class CastlingMViT(CastlingBackbone, MViT):
    """MViTv2 with linear-angular attention and a vanishing softmax branch.

    From "Castling-ViT" (You et al., CVPR 2023), on "MViTv2: Improved Multiscale Vision
    Transformers for Classification and Detection" (Li et al., CVPR 2022). No code of
    this variant is public; its structure is inferred from the published costs, which it
    meets with ``ffn_conv=5`` for the tiny and the base size (the small one costs 3.5%
    less than published). Runs at any image size, square or not: strides are 4, 8, 16
    and 32, and odd grids round up.

    Castled blocks keep one grid for q, k and v and pool the output where the original
    pools q. The softmax twin, ``attention=dict(type='softmax')`` without further
    options, is the published original: pooled keys and values, relative positions. It
    equals mmpretrain's ``MViT``, whose weights load by name, up to one point: outputs
    of inner scales are normed copies, where mmpretrain passes the normed tokens on to
    the next scale. Every other attention, softmax with ``local_conv`` or
    ``norm_output`` included, keeps the castled pooling.

    Classify with mmpretrain's ``GlobalAveragePooling`` and ``LinearClsHead``.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, or a dict with ``embed_dims``,
            ``num_layers``, ``num_heads`` and ``downscale_indices``. Defaults to
            ``'tiny'``.
        img_size: Usual image size, an int or ``(H, W)``, for the relative positions and
            the position embedding; castled blocks do not depend on it. Defaults to 224.
        in_channels: Channels of the image. Defaults to 3.
        out_indices: Scales whose output is returned, negative ones from the end. Each
            has its own norm. Defaults to -1.
        attention: Options of the mixer: ``type`` (such as ``'castling'``,
            ``'linear_angular'``, ``'softmax'``) and its arguments, see
            :func:`mmcastling.attention.build_mixer`; or a list of them, one per scale
            (a block that downsamples belongs to the finer scale, on whose grid it
            mixes). At a detector's sizes the first scales have too many tokens for the
            branch; ``'linear_angular'`` is the same network without it. Defaults to
            None (castling).
        ffn_conv: As in :class:`CastlingViT`. Defaults to 0.
        with_cp: As in :class:`CastlingViT`. Defaults to False.
        deploy: As in :class:`CastlingViT`. Defaults to False.
        drop_path_rate: Stochastic depth rate of the last block; the rates rise linearly
            from 0. Defaults to 0.
        frozen_stages: -1 to train everything, 0 to freeze the patch embedding, ``n`` to
            freeze it and the first ``n`` scales. Defaults to -1.
        **kwargs: Further arguments of mmpretrain's ``MViT``, such as
            ``use_abs_pos_embed``, ``rel_pos_spatial``, ``mlp_ratio`` and ``init_cfg``.

    Raises:
        ValueError: If an option or its value is not known.
    """

    arch_zoo = {name: MViT.arch_zoo[name] for name in ("tiny", "small", "base")}

    def __init__(
        self,
        arch: str | dict[str, Any] = "tiny",
        img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        attention: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
        ffn_conv: int = 0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        needed = {"embed_dims", "num_layers", "num_heads", "downscale_indices"}
        arch = check_arch(arch, self.arch_zoo, needed)
        check_ffn_conv(ffn_conv)
        num_scales = len(arch["downscale_indices"]) + 1
        known = set(inspect.signature(MViT.__init__).parameters) - {"self"}
        if unknown := set(kwargs) - (known - {"out_scales"}):
            raise OptionError(
                f"CastlingMViT has no options {sorted(unknown)}; MViT's are "
                f"{sorted(known)}, with out_indices in place of out_scales"
            )
        check_frozen_stages(frozen_stages, num_scales)
        super().__init__(
            arch=arch,
            img_size=image_size(img_size),
            in_channels=in_channels,
            out_scales=check_out_indices(out_indices, num_scales, "scale"),
            **{**kwargs, "rel_pos_spatial": False},
        )
        self.out_indices = self.out_scales
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.deploy = deploy
        self._castle_blocks(attention, ffn_conv, drop_path_rate, kwargs)
        self._freeze_stages()
        self._freeze_unused()
        if deploy:
            self.switch_to_deploy()

    def _castle_blocks(
        self,
        attention: dict[str, Any] | Sequence[dict[str, Any] | None] | None,
        ffn_conv: int,
        drop_path_rate: float,
        kwargs: dict[str, Any],
    ) -> None:
        if attention is None or isinstance(attention, dict):
            attention = [attention] * self.num_scales
        if len(attention) != self.num_scales:
            raise OptionError(
                f"attention is a list of {len(attention)}: give one entry for each of "
                f"the {self.num_scales} scales, or a single dict for all"
            )
        names = set(inspect.signature(MultiScaleBlock).parameters) - {"init_cfg"}
        shared = {name: kwargs[name] for name in kwargs if name in names}
        shared.setdefault("norm_cfg", dict(type="LN", eps=1e-6))  # as MViT has it
        shared["qkv_pool_kernel"] = kwargs.get("pool_kernel", (3, 3))
        rates = np.linspace(0, drop_path_rate, self.num_layers).tolist()
        grid, scale = tuple(self.patch_resolution), 0
        for i, block in enumerate(self.blocks):
            self.blocks[i] = CastlingMultiScaleBlock(
                block.in_dims,
                block.out_dims,
                block.attn.num_heads,
                input_size=grid,
                attention=attention[scale],
                ffn_conv=ffn_conv,
                stride_q=block.attn.pool_q.stride[0],
                stride_kv=block.attn.pool_k.stride[0],
                drop_path=rates[i],
                deploy=self.deploy,
                **shared,
            )
            grid = tuple(block.init_out_size)
            scale += i in self.downscale_indices

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(B, C, h, w)``, one per entry of ``out_indices``.

        Args:
            x: Images ``(B, in_channels, H, W)``.

        Raises:
            ValueError: If they are smaller than a patch.
        """
        return self.outputs_of(self.tokens_at(x, self.out_indices))

    def tokens_at(self, x: Tensor, indices: Iterable[int]) -> TokensAt:
        """Tokens behind each scale asked for, and their grid; none is run behind."""
        check_image(x, self.patch_embed.projection.stride[0], "a patch")
        x, grid = self.patch_embed(x)
        x = x.contiguous()  # (B, H*W, C), each token's channels together in memory
        if self.use_abs_pos_embed:
            x = x + resize_pos_embed(
                self.pos_embed,
                self.patch_resolution,
                grid,
                mode=self.interpolate_mode,
                num_extra_tokens=self.num_extra_tokens,
            )
        taken = {}
        for i, block in enumerate(self.blocks[: self._last_block(max(indices)) + 1]):
            x, grid = self._run(block, x, grid)
            scale = self.stage_indices.get(i)
            if scale in indices:
                taken[scale] = (x, grid)
        return taken

    def outputs_of(self, taken: TokensAt) -> tuple[Tensor, ...]:
        """The maps of :meth:`forward` of the tokens at ``out_indices``."""
        outs = []
        for scale in self.out_indices:
            x, grid = taken[scale]
            x = getattr(self, f"norm{scale}", nn.Identity())(x)
            outs.append(x.transpose(1, 2).unflatten(2, grid).contiguous())
        return tuple(outs)

    def truncate(self, last: int) -> None:
        """Drop the blocks behind a scale, whose output becomes the only one."""
        self.num_layers = self._last_block(last) + 1
        self.blocks = self.blocks[: self.num_layers]
        self.num_scales, self.out_indices = last + 1, [last]

    def _last_block(self, scale: int) -> int:
        return next(i for i, s in self.stage_indices.items() if s == scale)

    def _unused(self) -> list[nn.Module]:
        return list(self.blocks[self._last_block(max(self.out_indices)) + 1 :])

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        freeze([self.patch_embed])
        if self.use_abs_pos_embed:
            self.pos_embed.requires_grad = False
        if self.frozen_stages > 0:
            freeze(self.blocks[: self._last_block(self.frozen_stages - 1) + 1])
