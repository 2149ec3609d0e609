"""The simple feature pyramid: every scale from the one map of a plain backbone.

A plain vision transformer keeps one resolution from its first block to its last, so
there is no hierarchy for an FPN to merge. ViTDet (Li et al. 2022, "Exploring Plain
Vision Transformer Backbones for Object Detection", section 3) builds the pyramid from
the last map alone: deconvolution for the finer scales, max-pooling for the coarser.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmcastling.errors import OptionError
from mmcastling.registry import MODELS


@MODELS.register_module()
class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of a map ``(B, C, H, W)``, in fp32.

    mmpretrain's ``LN2d`` does the same job, but ``type='LN2d'`` cannot be found from
    an mmdet or mmseg config, whose scope ends at MMEngine's root registry. It is a
    ``nn.LayerNorm`` so that ``norm_decay_mult`` recognises it.

    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position; shape, dtype and memory format are kept."""
        # Statistics of half-precision maps are taken in fp32, with or without
        # autocast (CPU autocast leaves layer_norm in bf16).
        weight, bias = self.weight.float(), self.bias.float()
        out = x.float().permute(0, 2, 3, 1)  # (B, H, W, C)
        out = F.layer_norm(out, self.normalized_shape, weight, bias, self.eps)
        out = out.permute(0, 3, 1, 2).to(x.dtype)
        # Whose channels lie together already needs no copy, before or after.
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return out if channels_last else out.contiguous()


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Pyramid of maps from the last map of a plain backbone (ViTDet, section 3).

    For each stride: deconvolutions (kernel 2, stride 2, channels halved, layer norm
    and GELU between two of them) if it is finer than the input, nothing if it is
    equal, max-pooling if it is coarser; then 1x1 convolution, norm, 3x3 convolution,
    norm. Extra levels keep every second row and column of the level before.

    A level of stride ``s`` is ``ceil(H * in_stride / s)`` rows high, the size an FPN on
    a ResNet gives: no border of an odd map is dropped, no level is ever empty, and
    the anchors and points of mmdet cover the whole image.

    Args:
        in_channels: Channels of the backbone's map.
        out_channels: Channels of every level. Defaults to 256.
        in_stride: Stride of the backbone's map in pixels. Defaults to 16.
        strides: Strides of the levels, rising; each is ``in_stride`` times or divided
            by a power of two, such as 3.5 of 14. Defaults to (4, 8, 16, 32).
        num_extra_levels: Levels added by subsampling the last one; one gives the
            stride-64 level that a region proposal network expects. Defaults to 1.
        norm_cfg: Norm after each convolution. Defaults to None
            (:class:`ChannelLayerNorm`).
        init_cfg: Initialisation, on top of ``ConvModule``'s. Defaults to None.

    Raises:
        ValueError: If the strides are none of these, or the channels cannot be halved
            as often as the finest needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        in_stride: int = 16,
        strides: Sequence[float] = (4, 8, 16, 32),
        num_extra_levels: int = 1,
        norm_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        strides = tuple(strides)
        if not strides or any(a >= b for a, b in pairwise(strides)):
            raise OptionError(f"strides must be given and rise, got {strides}.")
        if num_extra_levels < 0:
            raise OptionError(
                f"num_extra_levels must be 0 or more, got {num_extra_levels}."
            )
        norm_cfg = norm_cfg or dict(type="mmcastling.ChannelLayerNorm", eps=1e-6)

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.in_stride = in_stride
        self.num_extra_levels = num_extra_levels
        extra = (strides[-1] * 2 ** (i + 1) for i in range(num_extra_levels))
        self.strides = (*strides, *extra)
        self.levels = nn.ModuleList(
            self._make_level(stride, norm_cfg) for stride in strides
        )

    def _make_level(self, stride: float, norm_cfg: dict) -> nn.Sequential:
        layers, channels = self._make_resampling(stride, norm_cfg)
        conv_cfg = dict(norm_cfg=norm_cfg, act_cfg=None)
        return nn.Sequential(
            *layers,
            ConvModule(channels, self.out_channels, 1, **conv_cfg),
            ConvModule(self.out_channels, self.out_channels, 3, padding=1, **conv_cfg),
        )

    def _make_resampling(
        self, stride: float, norm_cfg: dict
    ) -> tuple[list[nn.Module], int]:
        """Layers from ``in_stride`` to ``stride``, and the channels they end with."""
        fine, coarse = sorted((stride, self.in_stride))
        factor = int(coarse // fine) if fine > 0 else 0
        if factor * fine != coarse or factor & (factor - 1):
            raise OptionError(
                f"stride {stride} is not in_stride {self.in_stride} times or divided "
                f"by a power of two; take for example "
                f"{self.in_stride // 2}, {self.in_stride} or {self.in_stride * 2}."
            )
        channels = self.in_channels
        if stride >= self.in_stride:
            if factor == 1:
                return [], channels
            return [nn.MaxPool2d(factor, factor, ceil_mode=True)], channels
        if channels % factor:
            raise OptionError(
                f"in_channels {channels} cannot be halved {factor.bit_length() - 1} "
                f"times, as stride {stride} from in_stride {self.in_stride} needs."
            )
        layers: list[nn.Module] = []
        while factor > 1:
            layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
            channels, factor = channels // 2, factor // 2
            if factor > 1:
                layers += [build_norm_layer(norm_cfg, channels)[1], nn.GELU()]
        return layers, channels

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Build the levels.

        Args:
            inputs: The backbone's maps: exactly one, ``(B, in_channels, H, W)``.

        Returns:
            One map per stride ``s`` in ``self.strides``, ``(B, out_channels,
            ceil(H * in_stride / s), ceil(W * in_stride / s))``.

        Raises:
            TypeError, ValueError: If ``inputs`` is not a tuple or list, or holds
                anything but one such map.
        """
        # With channels last the norms need no copies and convolutions are faster.
        x = self._single_map(inputs).contiguous(memory_format=torch.channels_last)
        # Heads of several toolboxes call `.view` on the maps they are given.
        outs = [level(x).contiguous() for level in self.levels]
        for _ in range(self.num_extra_levels):
            outs.append(outs[-1][:, :, ::2, ::2].contiguous())
        return tuple(outs)

    def _single_map(self, inputs: Sequence[Tensor]) -> Tensor:
        if not isinstance(inputs, tuple | list):
            # A batch of one would otherwise pass for a tuple of one map.
            raise TypeError(
                "SimpleFeaturePyramid takes a tuple or list of maps, "
                f"got {type(inputs).__name__}."
            )
        if len(inputs) != 1:
            raise OptionError(
                f"SimpleFeaturePyramid takes one map, got {len(inputs)}; let the "
                "backbone give its last one only (out_indices=-1), or use an FPN."
            )
        x = inputs[0]
        if not torch.is_tensor(x) or x.ndim != 4 or x.shape[1] != self.in_channels:
            got = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
            raise OptionError(
                f"expected a map of shape (B, {self.in_channels}, H, W), got {got}; "
                "a mmpretrain backbone gives one with out_type='featmap'."
            )
        return x
