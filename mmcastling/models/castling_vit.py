"""CastlingViT: mmpretrain's plain vision transformer with castling attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.cnn.bricks.drop import build_dropout
from mmengine.logging import MMLogger
from mmengine.model.weight_init import trunc_normal_
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from mmpretrain.models.utils import build_norm_layer, resize_pos_embed
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmcastling.attention import Attention
from mmcastling.attention.local_conv import Grid
from mmcastling.errors import OptionError
from mmcastling.models.common import (
    CastlingBackbone,
    TokensAt,
    check_arch,
    check_ffn_conv,
    check_image,
    check_out_indices,
    image_size,
)
from mmcastling.models.conv_ffn import ConvFFN
from mmcastling.models.position_embedding import fit_position_embedding, note_grid
from mmcastling.models.stem import ConvStem
from mmcastling.registry import MODELS

TOKENS = ("cls_token", "dist_token")


class CastlingEncoderLayer(TransformerEncoderLayer):
    """A pre-norm encoder layer whose attention and MLP may know the grid of tokens.

    Args:
        attention, ffn_conv, deploy: As of :class:`CastlingViT`.
        **kwargs: Arguments of mmpretrain's ``TransformerEncoderLayer``.
    """

    def __init__(
        self,
        attention: dict[str, Any] | None = None,
        ffn_conv: int = 0,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_options(ffn_conv, **kwargs)
        super().__init__(**kwargs)
        embed_dims = self.embed_dims
        drop_rate = kwargs.get("drop_rate", 0.0)
        drop_path_rate = float(kwargs.get("drop_path_rate", 0.0))
        drop_path = dict(type="DropPath", drop_prob=drop_path_rate)
        layer_scale = kwargs.get("layer_scale_init_value", 0.0)
        options = dict(
            embed_dims=embed_dims,
            num_heads=kwargs["num_heads"],
            qkv_bias=kwargs.get("qkv_bias", True),
            layer_scale_init_value=layer_scale,
            proj_drop=drop_rate,
        )
        options.update(attention or {}, deploy=deploy)
        try:
            self.attn = Attention(**options)
        except TypeError as error:
            raise OptionError(f"attention={attention!r}: {error}") from error
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
class CastlingViT(CastlingBackbone, VisionTransformer):
    """Vision transformer with linear-angular attention and a vanishing softmax branch.

    From "Castling-ViT: Compressing Self-Attention via Switching Towards Linear-Angular
    Attention at Vision Transformer Inference" (You et al., CVPR 2023). Runs at any
    image size, square or not, and is built from mmpretrain, mmdet and mmseg configs as
    ``mmcastling.CastlingViT`` or ``mmpretrain.CastlingViT``. The names of parameters
    are those of mmpretrain's ``VisionTransformer`` (with a distillation token, of its
    ``DistilledVisionTransformer``), so its weights load.

    Args:
        arch: ``'nano'`` (tests and demos), ``'tiny'``, ``'small'``, ``'base'`` (DeiT's
            sizes), ``'large'`` (ViT-L), or a dict with ``embed_dims``, ``num_layers``,
            ``num_heads`` and ``feedforward_channels``. Defaults to ``'small'``.
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
        with_dist_token: Have DeiT's distillation token beside the class token, which
            must be there too; with ``out_type='cls_token'`` an output is the pair that
            mmpretrain's ``DeiTClsHead`` takes. Defaults to False.
        stem: ``'patch'`` for one convolution of the patch's size, ``'conv'`` for steps
            of stride 2. Defaults to ``'patch'``.
        with_cp: Recompute layers in the backward pass to save memory. Defaults to
            False.
        deploy: Build the deployed graph. Defaults to False.
        **kwargs: Further arguments of mmpretrain's ``VisionTransformer``, such as
            ``out_type``, ``with_cls_token``, ``drop_path_rate``, ``frozen_stages`` and
            ``init_cfg``.

    Raises:
        ValueError: If an option or its value is not known.
    """

    arch_zoo = {
        "nano": dict(
            embed_dims=128, num_layers=4, num_heads=4, feedforward_channels=128 * 4
        ),
        "tiny": VisionTransformer.arch_zoo["deit-tiny"],
        "small": VisionTransformer.arch_zoo["deit-small"],
        "base": VisionTransformer.arch_zoo["deit-base"],
        "large": VisionTransformer.arch_zoo["large"],
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
        with_dist_token: bool = False,
        stem: str = "patch",
        with_cp: bool = False,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        needed = {"embed_dims", "num_layers", "num_heads", "feedforward_channels"}
        arch = check_arch(arch, self.arch_zoo, needed)
        check_ffn_conv(ffn_conv)
        if stem not in ("patch", "conv"):
            raise OptionError(f"stem {stem!r} is not known: choose 'patch' or 'conv'")
        if with_dist_token and not kwargs.get("with_cls_token", True):
            raise OptionError(
                "with_dist_token needs the class token: with_cls_token=True"
            )
        # Before mmpretrain makes the position embedding, and freezes.
        self.num_extra_tokens = 2 if with_dist_token else 1
        self.dist_token = None
        num_layers = arch["num_layers"]
        indices = check_out_indices(out_indices, num_layers, "layer")
        try:
            super().__init__(
                arch=arch,
                img_size=image_size(img_size),
                patch_size=patch_size,
                in_channels=in_channels,
                out_indices=indices,
                **kwargs,
            )
        except (TypeError, ValueError) as error:
            raise OptionError(f"{type(self).__name__}: {error}") from error

        if with_dist_token:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dims))
        if stem == "conv":
            self.patch_embed = ConvStem(
                in_channels, self.embed_dims, patch_size, self.img_size
            )
            if self.patch_embed.init_out_size != tuple(self.patch_resolution):
                raise OptionError(
                    f"img_size {self.img_size} is not a multiple of patch_size "
                    f"{patch_size}"
                )
        self.patch_size = patch_size
        self.with_cp = with_cp
        self.deploy = deploy
        norm_cfg = kwargs.get("norm_cfg", dict(type="LN", eps=1e-6))
        self._castle_layers(
            kwargs,
            norm_cfg=norm_cfg,
            attention=attention,
            ffn_conv=ffn_conv,
            deploy=deploy,
        )

        for index in indices:
            if index != num_layers - 1:  # the last layer's norm is ln1
                norm = build_norm_layer(norm_cfg, self.embed_dims)
                self.add_module(f"out_norm{index}", norm)
        self._register_state_dict_hook(note_grid)
        if deploy:
            self.switch_to_deploy()
        self._freeze_stages()
        self._freeze_unused()

    def _castle_layers(self, kwargs: dict[str, Any], **shared: Any) -> None:
        names = ("layer_scale_init_value", "drop_rate", "qkv_bias")
        shared.update({name: kwargs[name] for name in names if name in kwargs})
        for name in ("embed_dims", "num_heads", "feedforward_channels"):
            shared[name] = self.arch_settings[name]
        rates = np.linspace(0, kwargs.get("drop_path_rate", 0.0), self.num_layers)
        per_layer = kwargs.get("layer_cfgs", {})
        if isinstance(per_layer, dict):
            per_layer = [per_layer] * self.num_layers
        for i, options in enumerate(per_layer):
            options = {**shared, "drop_path_rate": rates[i].item(), **options}
            self.layers[i] = CastlingEncoderLayer(**options)

    def init_weights(self) -> None:
        """Initialise, and load what ``init_cfg`` names, as all castled backbones."""
        if self.dist_token is not None and not self.is_init:
            trunc_normal_(self.dist_token, std=0.02)  # before weights may be loaded
        super().init_weights()

    def _prepare_pos_embed(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # In place of mmpretrain's, which expects this model's own class tokens.
        name = f"{prefix}pos_embed"
        if name in state_dict:
            state_dict[name], note = fit_position_embedding(
                state_dict[name],
                sum(f"{prefix}{token}" in state_dict for token in TOKENS),
                tuple(self.patch_resolution),
                self.num_extra_tokens,
                self.interpolate_mode,
                local_metadata,
            )
            if note:
                MMLogger.get_current_instance().info(f"{name}: {note}")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One output per entry of ``out_indices``, of the form ``out_type`` names.

        Args:
            x: Images ``(B, in_channels, H, W)``.

        Raises:
            ValueError: If they are smaller than a patch.
        """
        return self.outputs_of(self.tokens_at(x, self.out_indices))

    def tokens_at(self, x: Tensor, indices: Iterable[int]) -> TokensAt:
        """Tokens behind each layer asked for, and their grid; none is run behind."""
        check_image(x, self.patch_size, "a patch")
        if _is_traced() and not isinstance(self.patch_embed, ConvStem):
            # mmpretrain asks whether to pad, and the answer would hold for all sizes.
            patch = self.patch_size
            below, right = ((patch - side % patch) % patch for side in x.shape[2:])
            x = nn.functional.pad(x, (0, right, 0, below))
        x, grid = self.patch_embed(x)
        x = x.contiguous()  # (B, H*W, C), each token's channels together in memory
        tokens = [t for t in (self.cls_token, self.dist_token) if t is not None]
        if tokens:
            x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in tokens), x], dim=1)
        x = x + self._positions(grid)
        x = self.pre_norm(self.drop_after_pos(x))

        taken = {}
        for i, layer in enumerate(self.layers[: max(indices) + 1]):
            x = self._run(layer, x, grid)
            if i in indices:
                taken[i] = (x, grid)
        return taken

    def outputs_of(self, taken: TokensAt) -> tuple[Any, ...]:
        """What :meth:`forward` returns of the tokens at ``out_indices``."""
        return tuple(
            self._format_output(self._norm_output(i, tokens), grid)
            for i, (tokens, grid) in ((i, taken[i]) for i in self.out_indices)
        )

    def truncate(self, last: int) -> None:
        """Drop the layers behind one, whose output becomes the only one."""
        self.layers, self.num_layers = self.layers[: last + 1], last + 1
        self.out_indices = [last]

    def _unused(self) -> list[nn.Module]:
        last = max(self.out_indices)
        norm = [self.ln1] if self.final_norm and last < self.num_layers - 1 else []
        return [*self.layers[last + 1 :], *norm]

    def _positions(self, grid: Grid) -> Tensor:
        """The position embedding for a grid, ``(1, N, C)``."""
        if not _is_traced():
            return resize_pos_embed(
                self.pos_embed,
                self.patch_resolution,
                grid,
                mode=self.interpolate_mode,
                num_extra_tokens=self.num_extra_tokens,
            )
        # The same, without asking whether the sizes are equal, which would become a
        # condition of the graph. Where they are, interpolation changes nothing.
        extra = self.pos_embed[:, : self.num_extra_tokens]
        table = self.pos_embed[:, self.num_extra_tokens :].transpose(1, 2)
        table = table.reshape(1, self.embed_dims, *self.patch_resolution)
        table = nn.functional.interpolate(
            table, size=grid, mode=self.interpolate_mode, align_corners=False
        )
        return torch.cat((extra, table.flatten(2).transpose(1, 2)), dim=1)

    def _norm_output(self, index: int, x: Tensor) -> Tensor:
        if index != self.num_layers - 1:
            return getattr(self, f"out_norm{index}")(x)
        return self.ln1(x) if self.final_norm else x

    def _format_output(self, x: Tensor, grid: Grid) -> Tensor | tuple[Tensor, Tensor]:
        if self.out_type == "cls_token" and self.dist_token is not None:
            return x[:, 0], x[:, 1]
        if self.out_type == "featmap":  # mmpretrain's fails for no images at all
            patches = x[:, self.num_extra_tokens :].unflatten(1, grid)
            return patches.permute(0, 3, 1, 2)  # (B, C, H, W)
        return super()._format_output(x, grid)

    def _freeze_stages(self) -> None:
        if self.frozen_stages > 0:
            super()._freeze_stages()
            if self.dist_token is not None:
                self.dist_token.requires_grad = False


def _check_options(
    ffn_conv: int,
    attn_drop_rate: float = 0.0,
    ffn_type: str = "origin",
    num_fcs: int = 2,
    **options: Any,
) -> None:
    """Refuse options of mmpretrain's layer that ours could not let act."""
    if attn_drop_rate:
        raise OptionError(
            f"attn_drop_rate={attn_drop_rate!r}: the attention keeps no probabilities "
            "that could be dropped; use drop_rate or drop_path_rate"
        )
    if ffn_conv and (ffn_type != "origin" or num_fcs != 2):
        raise OptionError(
            f"ffn_conv={ffn_conv!r} is a convolution between the two layers of a plain "
            f"MLP, and there are ffn_type={ffn_type!r} and num_fcs={num_fcs!r}: leave "
            "one of them out"
        )


def _is_traced() -> bool:
    """Whether what is computed now becomes a graph for all sizes."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
