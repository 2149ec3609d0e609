"""Linear-angular attention, and the auxiliary branch that training adds to it.

``LinearAngularMixer`` is what is deployed. ``CastlingMixer`` is it plus a masked
softmax branch that exists in training only; the two attention blocks put projections
around them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmcastling.attention.block import TokenAttention
from mmcastling.attention.functional import (
    linear_angular_attention,
    linear_angular_direction,
)
from mmcastling.attention.masked_softmax import (
    mask_state,
    masked_softmax_with_state,
)
from mmcastling.attention.mixer import TokenMixer
from mmcastling.attention.threshold import MaskThreshold


class LinearAngularMixer(TokenMixer):
    """Linear-angular mixing with a local convolution, without auxiliary branch.

    Args:
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values.
        local_conv: As in :class:`TokenMixer`. Defaults to ``'token'``.
        norm_output: As in :class:`TokenMixer`. Defaults to True.
        reference_tokens: See :func:`linear_angular_attention`. Defaults to None.
    """

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        local_conv: str | dict[str, Any] | None = "token",
        norm_output: bool = True,
        reference_tokens: int | None = None,
    ) -> None:
        super().__init__(num_heads, head_dims, local_conv, norm_output)
        if reference_tokens is not None and reference_tokens < 1:
            raise ValueError(
                f"reference_tokens {reference_tokens!r} must be a positive number of "
                "tokens, or None for no scaling"
            )
        self.reference_tokens = reference_tokens

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_angular_attention(q, k, v, reference_tokens=self.reference_tokens)

    def mix_to_unit(
        self, q: Tensor, k: Tensor, v: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        return linear_angular_direction(
            q, k, v, reference_tokens=self.reference_tokens, plus=plus
        )


class CastlingMixer(LinearAngularMixer):
    """Linear-angular mixing plus a masked softmax branch that training removes.

    The whole state of the branch lives here, neither as parameter nor as buffer, so
    that checkpoints, EMA and distributed wrappers never see one vanish.

    Args:
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values.
        mask_threshold: Smallest surviving attention probability at the start, a number
            in [0, 1] or a multiple of uniform attention such as ``'4/N'``. Defaults to
            0.02, the released value.
        deploy: Build without the branch. Defaults to False.
        **kwargs: Further arguments of :class:`LinearAngularMixer`.

    Attributes:
        deploy: Whether the branch has been pruned.
        mask_threshold: The threshold in force, a :class:`MaskThreshold`.
        mask_weight: The branch's factor in force.
        mask_penalty: The factor of the penalty on surviving probabilities in force.
        mask_is_on: Whether the auxiliary branch contributes to the output.
        mask_density: Fraction of pairs that survived the mask in the last training
            forward, a scalar tensor; zero once the branch is off.
    """

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        mask_threshold: float | str | MaskThreshold = 0.02,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, head_dims, **kwargs)
        self.deploy = False
        self.mask_density = torch.zeros((), device="cpu")
        self.set_mask(mask_threshold)
        if deploy:
            CastlingMixer.switch_to_deploy(self)

    def set_mask(
        self,
        threshold: float | str | MaskThreshold,
        weight: float = 1.0,
        penalty: float = 0.0,
    ) -> None:
        """Set the auxiliary branch's threshold, weight and penalty.

        The branch is off, and computes nothing, when the threshold reaches 1 or the
        weight is 0.

        Args:
            threshold: A probability in [0, 1], or text such as ``'4/N'``.
            weight: Factor of the branch, not negative. Defaults to 1.
            penalty: Factor of the penalty on surviving probabilities, not negative;
                see :func:`masked_softmax_attention`. Defaults to 0.

        Raises:
            ValueError: If a value is out of range.
            RuntimeError: If the branch has been pruned.
        """
        threshold = MaskThreshold.parse(threshold)
        for name, value in (("weight", weight), ("penalty", penalty)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(
                    f"mask {name} {value!r} must be a finite number that is not "
                    "negative"
                )
        if self.deploy:
            raise RuntimeError(
                "the auxiliary branch of this attention has been pruned by "
                "switch_to_deploy; build the model with deploy=False to train it"
            )
        self.mask_threshold = threshold
        self.mask_weight = float(weight)
        self.mask_penalty = float(penalty)
        # What the forward pass reads: a flag, and values in a tensor. torch.compile
        # guards on the one and not on the other, so that a schedule recompiles once.
        self.mask_is_on = weight > 0.0 and not threshold.rejects_all
        self._mask_state = mask_state(threshold, weight, penalty)
        if not self.mask_is_on:
            self.mask_density = torch.zeros_like(self.mask_density)

    def switch_to_deploy(self) -> None:
        """Prune the auxiliary branch. Idempotent."""
        if self.deploy:
            return
        self.deploy = True
        self.mask_is_on = False
        del self.mask_threshold, self.mask_weight, self.mask_penalty
        del self.mask_density, self._mask_state

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = super().mix(q, k, v)
        if not self.mask_is_on:
            return y
        branch, density = masked_softmax_with_state(q, k, v, state=self._mask_state)
        if self.training:
            self.mask_density = density
        return branch + y

    def mix_to_unit(
        self, q: Tensor, k: Tensor, v: Tensor, plus: Tensor | None = None
    ) -> Tensor:
        if self.mask_is_on:  # the branch is not scaled with the query
            return TokenMixer.mix_to_unit(self, q, k, v, plus)
        return super().mix_to_unit(q, k, v, plus)

    def extra_repr(self) -> str:
        if self.deploy:
            return "deploy=True"
        return f"mask_threshold={self.mask_threshold}, mask_weight={self.mask_weight:g}"


class LinearAngularAttention(TokenAttention, LinearAngularMixer):
    """What is deployed: a block of linear-angular attention and local convolution.

    Takes the arguments of :class:`TokenAttention` and :class:`LinearAngularMixer`.
    """


class CastlingAttention(TokenAttention, CastlingMixer):
    """The castling block: linear-angular attention that trains with a masked softmax.

    Equal to the authors' released block in training form (threshold 0.02) and in
    deployed form. Takes the arguments of :class:`TokenAttention` (``embed_dims``,
    ``num_heads``, ``qkv_bias``, ...) and of :class:`CastlingMixer` (``local_conv``,
    ``mask_threshold``, ``deploy``, ...).
    """
