"""The projections of a plain attention block, around any mixer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmcastling.attention.linear import LayerScale, fold_layer_scale, fuse_linear
from mmcastling.attention.local_conv import Grid, merge_heads


class TokenAttention(nn.Module):
    """Project tokens to q, k and v, mix, project back.

    A mixin over a :class:`~mmcastling.attention.mixer.TokenMixer`, so that the block's
    parameters are named ``qkv``, ``proj`` and ``local_conv`` and softmax ViT weights
    load: ``class SoftmaxAttention(TokenAttention, SoftmaxMixer)``.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Number of heads ``h``, a divisor of ``embed_dims``.
        qkv_bias: Whether ``qkv`` has a bias. Defaults to True.
        proj_bias: Whether ``proj`` has a bias. Defaults to True.
        layer_scale_init_value: Initial factor of a learned scale per channel after
            ``proj``, 0 for none. Defaults to 0.
        proj_drop: Dropout after ``proj``. Defaults to 0.
        **mixer_options: Arguments of the mixer, such as ``local_conv``.

    Raises:
        ValueError: If ``embed_dims`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        layer_scale_init_value: float = 0.0,
        proj_drop: float = 0.0,
        **mixer_options: Any,
    ) -> None:
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(
                f"embed_dims {embed_dims} is not a multiple of num_heads {num_heads}"
            )
        super().__init__(num_heads, embed_dims // num_heads, **mixer_options)
        self.embed_dims = embed_dims
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims, bias=proj_bias)
        self.gamma1 = (
            LayerScale(embed_dims, layer_scale_init_value)
            if layer_scale_init_value > 0
            else nn.Identity()
        )
        self.proj_drop = nn.Dropout(proj_drop)
        if self.deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Fold the factors behind ``proj`` into it, prune what training needs.

        Both projections become :class:`~mmcastling.attention.linear.FusedLinear`.
        Idempotent; the output of inference stays the same up to rounding.
        """
        self.gamma1 = fold_layer_scale(self.proj, self.gamma1)
        self.proj_drop = nn.Identity()
        for layer in (self.qkv, self.proj):
            fuse_linear(layer)
        super().switch_to_deploy()

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Attend.

        Args:
            x: Tokens ``(B, N, C)``; the last ``H * W`` of them fill ``grid`` row by
                row, tokens before them (a class token) lie outside it.
            grid: ``(H, W)`` of the tokens; needed by ``local_conv='grid'`` only.

        Returns:
            Tokens ``(B, N, C)``.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dims)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        y = merge_heads(super().forward(q, k, v, grid))
        return self.gamma1(self.proj_drop(self.proj(y)))
