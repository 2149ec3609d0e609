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

from mmcastling.attention import GridConv
from mmcastling.attention.fast import apply_then, onednn_name, onednn_serves
from mmcastling.attention.local_conv import Grid, on_grid


class HiddenConv(GridConv):
    """Depthwise convolution of hidden tokens, which starts as the identity."""

    def __init__(self, channels: int, kernel_size: int = 5) -> None:
        super().__init__(1, channels, kernel_size)
        nn.init.zeros_(self.weight)  # nn.init.dirac_ takes seconds for this
        with torch.no_grad():
            self.weight[:, :, kernel_size // 2, kernel_size // 2] = 1.0

    def forward(self, hidden: Tensor, grid: Grid) -> Tensor:
        """Convolve ``(B, N, channels)``; class tokens before the grid keep their value.

        Raises:
            ValueError: If ``grid`` holds more than ``N`` tokens.
        """
        mixed = super().forward(hidden.unsqueeze(1), grid).squeeze(1)
        extra = hidden.shape[1] - grid[0] * grid[1]
        if extra:  # the convolution gives zero outside the grid
            rest = hidden.shape[1] - extra
            mixed = mixed + nn.functional.pad(hidden[:, :extra], (0, 0, 0, rest))
        return mixed


class FusedHiddenConv(HiddenConv):
    """The convolution of a deployed model, as a
    :class:`~mmcastling.attention.fast.FusedLinear` is its linear layer."""

    def then(self, activation: nn.Module, hidden: Tensor, grid: Grid) -> Tensor:
        """``activation(layer(hidden, grid))`` in the same pass, where oneDNN serves."""
        name, extra = onednn_name(activation), hidden.shape[1] - grid[0] * grid[1]
        serves = name is not None and onednn_serves(hidden, self.weight, self.bias)
        if not serves or extra < 0:
            return activation(self(hidden, grid))

        def convolve(x: Tensor) -> Tensor:
            shape = self.padding, self.stride, self.dilation, self.groups
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *shape, *name
            )

        mixed, _ = on_grid(convolve, hidden[:, extra:], grid)
        if extra:
            mixed = torch.cat([activation(hidden[:, :extra]), mixed], dim=1)
        return mixed


class ConvFFN(FFN):
    """The MLP of a plain vision transformer, with a convolution.

    Args:
        *args, **kwargs: Of :class:`mmcv.cnn.bricks.transformer.FFN`, with two layers.
        kernel_size: Odd kernel size. Defaults to 5.
    """

    def __init__(self, *args: Any, kernel_size: int = 5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dwconv = HiddenConv(self.feedforward_channels, kernel_size)

    def forward(
        self, x: Tensor, identity: Tensor | None = None, grid: Grid = ()
    ) -> Tensor:
        """Apply to tokens ``(B, N, C)`` on ``grid``, and add ``identity``."""
        (fc1, activation, drop1), fc2, drop2 = self.layers
        hidden = apply_then(self.dwconv, activation, fc1(x), grid)  # (B, N, hidden)
        out = self.gamma2(drop2(fc2(drop1(hidden))))
        return self.dropout_layer(out) + (x if identity is None else identity)


class ConvMViTMLP(MViTMLP):
    """MViTv2's MLP on a grid; with ``kernel_size=0`` it has no convolution."""

    def __init__(self, in_channels: int, kernel_size: int = 5, **kwargs: Any) -> None:
        super().__init__(in_channels, **kwargs)
        if kernel_size:
            self.dwconv = HiddenConv(self.fc1.out_features, kernel_size)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Apply to tokens ``(B, H * W, in_channels)``."""
        if hasattr(self, "dwconv"):
            return self.fc2(apply_then(self.dwconv, self.act, self.fc1(x), grid))
        return self.fc2(apply_then(self.fc1, self.act, x))


class ConvLeViTMLP(LeViTMLP):
    """LeViT's MLP on a grid; with ``kernel_size=0`` it has no convolution.

    The convolution follows the batch norm of the first layer and has none of its own:
    at deployment that norm folds into the layer, and nothing remains to fold.
    """

    def __init__(self, embed_dims: int, mlp_ratio: int, kernel_size: int = 5) -> None:
        super().__init__(embed_dims, mlp_ratio)
        if kernel_size:
            self.dwconv = HiddenConv(self.linear1.linear.out_features, kernel_size)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Apply to tokens ``(B, H * W, C)``."""
        if hasattr(self, "dwconv"):
            hidden = apply_then(self.dwconv, self.activation, self.linear1(x), grid)
        else:
            hidden = apply_then(self.linear1, self.activation, x)
        return self.linear2(hidden)
