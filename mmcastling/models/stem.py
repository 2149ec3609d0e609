"""A convolutional stem: an image to tokens in overlapping steps of stride 2."""

from __future__ import annotations

from itertools import pairwise

from mmengine.model import BaseModule
from mmpretrain.models.utils import LayerNorm2d
from torch import Tensor, nn

from mmcastling.errors import OptionError


class ConvStem(BaseModule):
    """Tokens from 3x3 convolutions of stride 2, each halving the resolution.

    Stands in for the patch embedding where objects are small and training is from
    scratch. The channels double at each step up to ``embed_dims``; sizes round up.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels ``C`` of the tokens, a multiple of ``patch_size / 2``.
        patch_size: Total stride, a power of two.
        input_size: The usual ``(H, W)`` of an image; ``init_out_size`` is its grid.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 2**steps:
            raise OptionError(
                f"stem='conv' needs a patch_size that is a power of two, got "
                f"{patch_size}"
            )
        if embed_dims % 2 ** (steps - 1):
            raise OptionError(
                f"stem='conv' with {steps} steps needs embed_dims that are a multiple "
                f"of {2 ** (steps - 1)}, got {embed_dims}"
            )
        widths = [in_channels] + [embed_dims >> (steps - 1 - i) for i in range(steps)]
        layers: list[nn.Module] = []
        for before, width in pairwise(widths):
            conv = nn.Conv2d(before, width, 3, stride=2, padding=1)
            layers += [conv, LayerNorm2d(width), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.init_out_size = tuple(-(-size // patch_size) for size in input_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn ``(B, in_channels, H, W)`` into tokens ``(B, N, C)`` and their grid."""
        x = self.layers(x)  # (B, C, h, w)
        grid = (x.shape[2], x.shape[3])
        return x.flatten(2).transpose(1, 2), grid
