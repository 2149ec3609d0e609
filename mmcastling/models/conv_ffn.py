"""MLPs with a depthwise convolution on the grid of tokens in their hidden layer.

``fc1 -> depthwise k x k on the grid -> activation -> fc2``: with a 5x5 kernel the costs
of castled models match the published ones. One class per MLP that the backbones
inherit from, with its parameters' names, so that the weights of plain MLPs load.
"""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmpretrain.models.backbones.levit import MLP as LeViTMLP
from mmpretrain.models.backbones.mvit import MLP as MViTMLP
from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer, apply_then, one_pass
from mmcastling.attention.local_conv import Grid, count_extra, grid_conv, on_grid


def hidden_conv(channels: int, kernel_size: int) -> nn.Conv2d:
    """A depthwise convolution of maps, which starts as the identity."""
    conv = grid_conv(channels, kernel_size)
    nn.init.zeros_(conv.weight)  # nn.init.dirac_ takes seconds for this
    with torch.no_grad():
        conv.weight[:, :, kernel_size // 2, kernel_size // 2] = 1.0
    return conv


def convolve_then(
    conv: nn.Module, activation: nn.Module, hidden: Tensor, grid: Grid
) -> Tensor:
    """Convolve ``(B, N, channels)`` on their grid and apply the activation.

    Class tokens before the grid pass the convolution by.

    Raises:
        ValueError: If ``grid`` holds more than ``N`` tokens.
    """
    extra = count_extra(hidden.shape[1], grid)
    both = one_pass(conv, activation, hidden)
    mixed, _ = on_grid(both or conv, hidden[:, extra:], grid)
    if extra:
        leading = hidden[:, :extra]
        leading = leading if both is None else activation(leading)
        mixed = torch.cat([leading, mixed], dim=1)
    return activation(mixed) if both is None else mixed


class ConvFFN(FFN):
    """The MLP of a plain vision transformer, with a convolution.

    Args:
        *args, **kwargs: Of :class:`mmcv.cnn.bricks.transformer.FFN`, with two layers.
        kernel_size: Odd kernel size. Defaults to 5.
    """

    def __init__(self, *args: Any, kernel_size: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dwconv = hidden_conv(self.feedforward_channels, kernel_size)

    def forward(
        self, x: Tensor, identity: Tensor | None = None, grid: Grid = ()
    ) -> Tensor:
        """Apply to tokens ``(B, N, C)`` on ``grid``, and add ``identity``."""
        (fc1, activation, drop1), fc2, drop2 = self.layers
        hidden = apply_layer(fc1, x)  # (B, N, hidden)
        hidden = convolve_then(self.dwconv, activation, hidden, grid)
        out = self.gamma2(drop2(apply_layer(fc2, drop1(hidden))))
        return self.dropout_layer(out) + (x if identity is None else identity)


class ConvMViTMLP(MViTMLP):
    """MViTv2's MLP on a grid; with ``kernel_size=0`` it has no convolution."""

    def __init__(self, in_channels: int, kernel_size: int = 5, **kwargs: Any) -> None:
        super().__init__(in_channels, **kwargs)
        if kernel_size:
            self.dwconv = hidden_conv(self.fc1.out_features, kernel_size)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Apply to tokens ``(B, H * W, in_channels)``."""
        if hasattr(self, "dwconv"):
            hidden = apply_layer(self.fc1, x)
            hidden = convolve_then(self.dwconv, self.act, hidden, grid)
        else:
            hidden = apply_then(self.fc1, self.act, x)
        return apply_layer(self.fc2, hidden)


class ConvLeViTMLP(LeViTMLP):
    """LeViT's MLP on a grid; with ``kernel_size=0`` it has no convolution.

    The convolution follows the batch norm of the first layer and has none of its own:
    at deployment that norm folds into the layer, and nothing remains to fold.
    """

    def __init__(self, embed_dims: int, mlp_ratio: int, kernel_size: int = 5) -> None:
        super().__init__(embed_dims, mlp_ratio)
        if kernel_size:
            self.dwconv = hidden_conv(self.linear1.linear.out_features, kernel_size)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Apply to tokens ``(B, H * W, C)``."""
        if hasattr(self, "dwconv"):
            hidden = apply_layer(self.linear1, x)
            hidden = convolve_then(self.dwconv, self.activation, hidden, grid)
        else:
            hidden = apply_then(self.linear1, self.activation, x)
        return apply_layer(self.linear2, hidden)
