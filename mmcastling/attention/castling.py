"""The attention blocks: one skeleton, three ways to mix tokens.

``SoftmaxAttention`` is the baseline, ``LinearAngularAttention`` what is deployed, and
``CastlingAttention`` the latter plus the auxiliary branch that exists in training only.
All take ``(B, N, C)`` tokens and hold ``qkv``, ``proj`` and ``local_conv``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.functional import (
    linear_angular_attention,
    masked_softmax_attention,
    unit_rows,
)
from mmcastling.attention.local_conv import Grid, build_local_conv
from mmcastling.attention.threshold import MaskThreshold


class LayerScale(nn.Module):
    """A learned factor per channel, named as mmpretrain names it.

    Args:
        embed_dims: Channels ``C`` of the last axis.
        init_value: Initial factor.
    """

    def __init__(self, embed_dims: int, init_value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((embed_dims,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class TokenAttention(nn.Module):
    """The skeleton: project to q, k, v; mix; normalise; add local_conv(v); project.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Number of heads ``h``, a divisor of ``embed_dims``.
        qkv_bias: Whether ``qkv`` has a bias. Defaults to True.
        proj_bias: Whether ``proj`` has a bias. Defaults to True.
        local_conv: Depthwise convolution added to the mixed values: ``'token'`` (the
            paper's), ``'grid'`` (2-D), a dict with ``type`` and ``kernel_size``, or
            None. Defaults to None.
        norm_output: Whether each head's output vector is scaled to length 1 before
            ``local_conv`` is added, as the released block does. Defaults to False.
        layer_scale_init_value: Initial factor of a learned scale per channel after
            ``proj``, 0 for none. Defaults to 0.
        proj_drop: Dropout after ``proj``. Defaults to 0.

    Raises:
        ValueError: If ``embed_dims`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        local_conv: str | dict[str, Any] | None = None,
        norm_output: bool = False,
        layer_scale_init_value: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dims % num_heads:
            raise ValueError(
                f"embed_dims {embed_dims} is not a multiple of num_heads {num_heads}"
            )
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.norm_output = norm_output
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        self.proj = nn.Linear(embed_dims, embed_dims, bias=proj_bias)
        self.gamma1 = (
            LayerScale(embed_dims, layer_scale_init_value)
            if layer_scale_init_value > 0
            else nn.Identity()
        )
        self.proj_drop = nn.Dropout(proj_drop)
        self.local_conv = build_local_conv(local_conv, num_heads, self.head_dims)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Mix values over tokens: three ``(B, h, N, d)`` to one."""
        raise NotImplementedError

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
        y = self.mix(q, k, v)
        if self.norm_output:
            y = unit_rows(y)
        y = y.to(v.dtype)
        if self.local_conv is not None:
            y = y + self.local_conv(v, grid)
        y = y.transpose(1, 2).reshape(batch, tokens, self.embed_dims)
        return self.gamma1(self.proj_drop(self.proj(y)))


class SoftmaxAttention(TokenAttention):
    """Softmax attention, torch's fused kernel: what castling replaces.

    With ``local_conv`` and ``norm_output`` it is the control that separates the
    kernel's merit from the convolution's. Arguments as in :class:`TokenAttention`.
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class LinearAngularAttention(TokenAttention):
    """Linear-angular attention with a local convolution, without auxiliary branch.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Number of heads ``h``.
        local_conv: As in :class:`TokenAttention`. Defaults to ``'token'``.
        norm_output: As in :class:`TokenAttention`. Defaults to True.
        reference_tokens: See :func:`linear_angular_attention`. Defaults to None.
        **kwargs: Further arguments of :class:`TokenAttention`.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        *args: Any,
        local_conv: str | dict[str, Any] | None = "token",
        norm_output: bool = True,
        reference_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embed_dims,
            num_heads,
            *args,
            local_conv=local_conv,
            norm_output=norm_output,
            **kwargs,
        )
        if reference_tokens is not None and reference_tokens < 1:
            raise ValueError(
                f"reference_tokens {reference_tokens!r} must be a positive number of "
                "tokens, or None for no scaling"
            )
        self.reference_tokens = reference_tokens

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_angular_attention(q, k, v, reference_tokens=self.reference_tokens)


class CastlingAttention(LinearAngularAttention):
    """Linear-angular attention plus a masked softmax branch that training removes.

    The whole state of the branch lives here, as plain numbers: no parameter and no
    buffer, so that checkpoints, EMA and distributed wrappers never see one vanish.

    Args:
        embed_dims: Channels ``C``.
        num_heads: Number of heads ``h``.
        qkv_bias: Whether ``qkv`` has a bias. Defaults to True.
        local_conv: As in :class:`TokenAttention`. Defaults to ``'token'``.
        mask_threshold: Smallest surviving attention probability at the start, a number
            in [0, 1] or a multiple of uniform attention such as ``'4/N'``. Defaults to
            0.02, the released value.
        deploy: Build without the branch. Defaults to False.
        **kwargs: Further arguments of :class:`LinearAngularAttention`.

    Attributes:
        deploy: Whether the branch has been pruned.
        mask_threshold: The threshold in force, a :class:`MaskThreshold`.
        mask_weight: The branch's factor in force.
        mask_density: Fraction of pairs that survived the mask in the last training
            forward, a scalar tensor; zero when the branch was off.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        qkv_bias: bool = True,
        local_conv: str | dict[str, Any] | None = "token",
        mask_threshold: float | str | MaskThreshold = 0.02,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            embed_dims, num_heads, qkv_bias=qkv_bias, local_conv=local_conv, **kwargs
        )
        self.deploy = False
        self.mask_density = torch.zeros(())
        self.set_mask(mask_threshold)
        if deploy:
            self.switch_to_deploy()

    def set_mask(
        self, threshold: float | str | MaskThreshold, weight: float = 1.0
    ) -> None:
        """Set the auxiliary branch's threshold and weight.

        The branch is off, and computes nothing, when the threshold reaches 1 or the
        weight is 0.

        Args:
            threshold: A probability in [0, 1], or text such as ``'4/N'``.
            weight: Factor of the branch, not negative. Defaults to 1.

        Raises:
            ValueError: If a value is out of range.
            RuntimeError: If the branch has been pruned.
        """
        threshold = MaskThreshold.parse(threshold)
        if not 0.0 <= weight < float("inf"):
            raise ValueError(
                f"mask weight {weight!r} must be a finite number that is not negative"
            )
        if self.deploy:
            raise RuntimeError(
                "the auxiliary branch of this attention has been pruned by "
                "switch_to_deploy; build the model with deploy=False to train it"
            )
        self.mask_threshold = threshold
        self.mask_weight = float(weight)

    @property
    def mask_is_on(self) -> bool:
        """Whether the auxiliary branch contributes to the output."""
        return (
            not self.deploy
            and self.mask_weight > 0.0
            and not self.mask_threshold.rejects_all
        )

    def switch_to_deploy(self) -> None:
        """Prune the auxiliary branch. Idempotent."""
        if self.deploy:
            return
        self.deploy = True
        del self.mask_threshold, self.mask_weight, self.mask_density

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = super().mix(q, k, v)
        if not self.mask_is_on:
            if self.training and not self.deploy:
                self.mask_density = y.new_zeros(())
            return y
        branch, density = masked_softmax_attention(
            q,
            k,
            v,
            threshold=self.mask_threshold,
            weight=self.mask_weight,
            return_density=True,
        )
        if self.training:
            self.mask_density = density
        return branch + y

    def extra_repr(self) -> str:
        if self.deploy:
            return "deploy=True"
        return f"mask_threshold={self.mask_threshold}, mask_weight={self.mask_weight:g}"
