"""CastlingLeViT: LeViT's pyramid with castled attention, at any image size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mmcv.cnn import build_norm_layer
from mmengine.model import ModuleList
from mmengine.utils import is_seq_of
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.backbones.levit import HybridBackbone, LeViT
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmcastling.attention.local_conv import Grid
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
from mmcastling.models.conv_ffn import ConvLeViTMLP
from mmcastling.models.levit_blocks import (
    BiasedSoftmaxAttention,
    CastlingLeViTAttention,
    GridResidual,
    strided_grid,
)
from mmcastling.registry import MODELS

STEM_STRIDE = 16
# The stem is four convolutions with activations between them: after entry 5 comes the
# last convolution, and the stride is 8.
STEM_OUT = 5


@MODELS.register_module()
@MMPRETRAIN_MODELS.register_module()
class CastlingLeViT(CastlingBackbone, BaseBackbone):
    """LeViT with linear-angular attention and a vanishing softmax branch.

    From "Castling-ViT" (You et al., CVPR 2023), on "LeViT: a Vision Transformer in
    ConvNet's Clothing for Faster Inference" (Graham et al., ICCV 2021). No code of this
    variant is public; its structure is inferred from the published costs, which it
    meets with ``ffn_conv=5``. Runs at any image size, square or not: strides are 16, 32
    and 64, and odd grids round up.

    Blocks that castling changes, with ``C`` channels and LeViT's key width ``d``:

    - within a stage, q, k and v of ``C`` channels in ``C / 2d`` heads, mixed,
      Hardswish, and a projection to ``C``, with a residual;
    - between stages, q, k and v of ``4 C`` channels in ``C / d`` heads, mixed on the
      full grid, every second row and column of it, Hardswish, and a projection to the
      next stage's channels, without residual.

    The softmax twin, ``attention=dict(type='softmax')`` without further options, is the
    published original: narrow keys, logit biases, queries subsampled first. It equals
    mmpretrain's ``LeViT``, whose weights load by name. Every other attention, softmax
    with ``local_conv`` or ``norm_output`` included, keeps the castled projections.

    Classify with mmpretrain's ``GlobalAveragePooling`` and ``LeViTClsHead``.

    Args:
        arch: ``'128s'``, ``'128'``, ``'192'``, ``'256'``, ``'384'``, or a dict with the
            lists ``embed_dims``, ``key_dims``, ``num_heads`` (of the original blocks)
            and ``depths``, one entry per stage. Defaults to ``'256'``.
        img_size: Usual image size, an int or ``(H, W)``, for the logit biases of the
            original blocks; nothing else depends on it. Defaults to 224.
        out_indices: Stages whose output is returned, negative ones from the end. Each
            but the last stage has its own norm; for the last see ``final_norm``.
            Defaults to -1.
        out_stem: Return the stem's map of stride 8, which has half the channels of the
            first stage, in front of the others. Defaults to False.
        final_norm: Whether the last stage's output has a norm too. mmpretrain's
            ``LeViTClsHead`` begins with one, a detector's neck does not. Defaults to
            False.
        norm_cfg: Norm of the outputs. Defaults to None (``dict(type='BN')``).
        attention: Options of the mixer: ``type`` (such as ``'castling'``,
            ``'linear_angular'``, ``'softmax'``) and its arguments, see
            :func:`mmcastling.attention.build_mixer`. Defaults to None (castling).
        ffn_conv: As in :class:`CastlingViT`. Defaults to 0.
        with_cp: As in :class:`CastlingViT`. Defaults to False.
        deploy: As in :class:`CastlingViT`. Defaults to False.
        mlp_ratio: Channels of the MLPs' hidden layers in units of the stage's.
            Defaults to 2.
        drop_path_rate: Stochastic depth rate of the last block; the rates rise linearly
            from 0. Defaults to 0.
        frozen_stages: -1 to train everything, 0 to freeze the stem, ``n`` to freeze
            stem and first ``n`` stages. Defaults to -1.
        norm_eval: Keep batch norms in evaluation, as small batches of a detector that
            starts from trained weights need. Defaults to False.
        init_cfg: Initialisation. Defaults to None.

    Raises:
        ValueError: If an option or its value is not known.
    """

    arch_zoo = LeViT.arch_zoo

    def __init__(
        self,
        arch: str | dict[str, Sequence[int]] = "256",
        img_size: int | Sequence[int] = 224,
        out_indices: int | Sequence[int] = -1,
        out_stem: bool = False,
        final_norm: bool = False,
        norm_cfg: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        ffn_conv: int = 0,
        mlp_ratio: int = 2,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        norm_cfg = norm_cfg or dict(type="BN")
        self.arch_settings = self._check_arch(arch)
        check_ffn_conv(ffn_conv)
        self.embed_dims = list(self.arch_settings["embed_dims"])
        self.num_stages = len(self.embed_dims)
        nothing = not isinstance(out_indices, int) and not out_indices
        self.out_indices = (
            []  # of the stages, which the stem does not need
            if nothing and out_stem
            else check_out_indices(out_indices, self.num_stages, "stage")
        )
        check_frozen_stages(frozen_stages, self.num_stages)
        self.out_stem = out_stem
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.deploy = deploy

        self.patch_embed = HybridBackbone(self.embed_dims[0])
        self.stages = self._build_stages(
            attention, ffn_conv, mlp_ratio, drop_path_rate, image_size(img_size)
        )
        for index in self.out_indices:
            if final_norm or index != self.num_stages - 1:
                norm = build_norm_layer(norm_cfg, self.embed_dims[index])[1]
                self.add_module(f"norm{index}", norm)
        if out_stem:
            self.norm_stem = build_norm_layer(norm_cfg, self.embed_dims[0] // 2)[1]
        self._freeze_stages()
        self._freeze_unused()
        if deploy:
            self.switch_to_deploy()

    def _check_arch(self, arch: str | dict[str, Any]) -> dict[str, Any]:
        names = ("embed_dims", "key_dims", "num_heads", "depths")
        arch = check_arch(arch, self.arch_zoo, set(names))
        lists = [arch[name] for name in names]
        if not all(is_seq_of(v, int) and len(v) == len(lists[0]) for v in lists):
            raise OptionError(
                f"arch {arch!r}: {names} must be lists with one number per stage"
            )
        dims, keys = arch["embed_dims"], arch["key_dims"]
        if dims[0] % 8:
            raise OptionError(
                f"arch {arch!r}: the stem halves the first of embed_dims three times, "
                f"and {dims[0]} is not a multiple of 8"
            )
        for i, (width, key) in enumerate(zip(dims, keys, strict=True)):
            heads = width // (2 * key)
            if not heads or width % heads:
                raise OptionError(
                    f"arch {arch!r}: {width} channels cannot be split into {heads} "
                    f"heads of about 2 x {key}"
                )
            if i and dims[i - 1] % key:
                raise OptionError(
                    f"arch {arch!r}: {dims[i - 1]} channels are not a multiple of the "
                    f"next stage's key width {key}"
                )
        return arch

    def _build_stages(
        self,
        attention: dict[str, Any] | None,
        ffn_conv: int,
        mlp_ratio: int,
        drop_path_rate: float,
        img_size: Grid,
    ) -> ModuleList:
        depths = self.arch_settings["depths"]
        # An attention and an MLP per block, and an MLP after each subsampling.
        count = 2 * sum(depths) + len(depths) - 1
        rates = iter(np.linspace(0, drop_path_rate, count).tolist())
        grid = strided_grid(img_size, STEM_STRIDE)
        stages = ModuleList()
        for i, width in enumerate(self.embed_dims):
            blocks: list[nn.Module] = []
            for source in ([i - 1] if i else []) + [i] * depths[i]:
                mixing = self._attention(source, i, attention, grid)
                if source == i:
                    mixing = GridResidual(mixing, next(rates))
                else:
                    grid = strided_grid(grid, 2)
                mlp = ConvLeViTMLP(width, mlp_ratio, ffn_conv)
                blocks += [mixing, GridResidual(mlp, next(rates))]
            stages.append(ModuleList(blocks))
        return stages

    def _attention(
        self, source: int, target: int, spec: dict[str, Any] | None, grid: Grid
    ) -> nn.Module:
        """The attention within a stage, or between two."""
        in_dims, out_dims = self.embed_dims[source], self.embed_dims[target]
        key_dims = self.arch_settings["key_dims"][target]
        stride = 1 if source == target else 2
        if spec is not None and dict(spec) == {"type": "softmax"}:
            heads = self.arch_settings["num_heads"][target]
            return BiasedSoftmaxAttention(
                in_dims,
                out_dims,
                key_dims,
                num_heads=heads if stride == 1 else in_dims // key_dims,
                attn_ratio=2 * stride,
                grid=grid,
                stride=stride,
            )
        return CastlingLeViTAttention(
            in_dims,
            in_dims if stride == 1 else 4 * in_dims,
            out_dims,
            num_heads=in_dims // (2 * key_dims if stride == 1 else key_dims),
            stride=stride,
            attention=spec,
            deploy=self.deploy,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(B, C, h, w)``: with ``out_stem`` the stem's, then ``out_indices``'.

        Args:
            x: Images ``(B, 3, H, W)``.

        Raises:
            ValueError: If they are smaller than the stem's stride.
        """
        stem, x = self._embed(x)
        outs = self.outputs_of(self._tokens_at(x, self.out_indices))
        return (self.norm_stem(stem), *outs) if self.out_stem else outs

    def tokens_at(self, x: Tensor, indices: Iterable[int]) -> TokensAt:
        """Tokens behind each stage asked for, and their grid; none is run behind."""
        return self._tokens_at(self._embed(x)[1], indices)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of images in the middle of the stem and behind it."""
        check_image(x, STEM_STRIDE, "the stem's stride")
        stem = x
        for i, layer in enumerate(self.patch_embed.patch_embed):
            x = layer(x)
            stem = x if i == STEM_OUT else stem
        return stem, x

    def _tokens_at(self, x: Tensor, indices: Iterable[int]) -> TokensAt:
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, H*W, C)
        taken = {}
        for i, stage in enumerate(self.stages[: max(indices, default=-1) + 1]):
            for block in stage:
                x = self._run(block, x, grid)
                grid = strided_grid(grid, block.stride)
            if i in indices:
                taken[i] = (x, grid)
        return taken

    def outputs_of(self, taken: TokensAt) -> tuple[Tensor, ...]:
        """The maps of :meth:`forward` of the tokens at ``out_indices``."""
        outs = []
        for i in self.out_indices:
            x, grid = taken[i]
            out = x.transpose(1, 2).unflatten(2, grid).contiguous()
            norm = getattr(self, f"norm{i}", None)
            outs.append(out if norm is None else norm(out))
        return tuple(outs)

    def truncate(self, last: int) -> None:
        """Drop the stages behind one, whose output becomes the only one."""
        self.stages, self.num_stages = self.stages[: last + 1], last + 1
        self.out_indices = [last]

    def _unused(self) -> list[nn.Module]:
        # A stem's output alone needs no stage.
        return list(self.stages[max(self.out_indices, default=-1) + 1 :])

    @property
    def num_layers(self) -> int:
        """Number of layers, each an attention and the MLP behind it."""
        return sum(map(len, self.stages)) // 2

    def _layer_index(self, stage: str, block: str, *inside: str) -> int:
        return (sum(map(len, self.stages[: int(stage)])) + int(block)) // 2

    def _freeze_stages(self) -> None:
        if self.frozen_stages >= 0:
            freeze([self.patch_embed, *self.stages[: self.frozen_stages]])
        if self.training and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
