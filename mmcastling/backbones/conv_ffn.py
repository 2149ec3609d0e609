"""An MLP with a depthwise convolution on the grid of tokens in its hidden layer."""

from __future__ import annotations

from typing import Any

from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from mmcastling.attention import GridConv


class ConvFFN(FFN):
    """``fc1 -> depthwise k x k on the grid -> activation -> fc2``.

    With a 5x5 kernel the costs of a castled model match the published ones. Class
    tokens are not on the grid and keep their value. The parameters keep mmcv's names,
    so that the weights of a plain MLP load; the convolution starts as the identity.

    Args:
        embed_dims: Channels ``C`` of the tokens.
        feedforward_channels: Channels of the hidden layer.
        kernel_size: Odd kernel size. Defaults to 5.
        **kwargs: Further arguments of :class:`mmcv.cnn.bricks.transformer.FFN`.
    """

    def __init__(
        self,
        embed_dims: int,
        feedforward_channels: int,
        kernel_size: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embed_dims=embed_dims, feedforward_channels=feedforward_channels, **kwargs
        )
        if self.num_fcs != 2:
            raise ValueError(
                f"ConvFFN has two linear layers, got num_fcs={self.num_fcs}"
            )
        self.dwconv = GridConv(1, feedforward_channels, kernel_size)
        nn.init.dirac_(self.dwconv.weight, groups=feedforward_channels)

    def forward(
        self, x: Tensor, identity: Tensor | None = None, grid: tuple[int, int] = ()
    ) -> Tensor:
        """Apply to tokens ``(B, N, C)`` on ``grid``, and add ``identity``."""
        (fc1, activation, drop1), fc2, drop2 = self.layers
        hidden = fc1(x)  # (B, N, hidden)
        mixed = self.dwconv(hidden.unsqueeze(1), grid).squeeze(1)
        extra = hidden.shape[1] - grid[0] * grid[1]
        if extra:  # the convolution gives zero outside the grid
            mixed = mixed + nn.functional.pad(
                hidden[:, :extra], (0, 0, 0, hidden.shape[1] - extra)
            )
        out = self.gamma2(drop2(fc2(drop1(activation(mixed)))))
        out = self.dropout_layer(out)
        if not self.add_identity:
            return out
        return out + (x if identity is None else identity)
