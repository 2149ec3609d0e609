"""The auxiliary branch of a castling attention, and its state."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcastling.attention.masked_softmax import mask_state, masked_softmax_with_state
from mmcastling.attention.threshold import MaskThreshold
from mmcastling.errors import OptionError


class MaskedBranch:
    """The masked softmax that a castling attention trains with, until it is deployed.

    No module and without parameters or buffers, so that checkpoints, EMA and
    distributed wrappers never see one vanish.

    Args:
        threshold: As in :meth:`set`.

    Attributes:
        threshold: The threshold in force, a :class:`MaskThreshold`.
        weight: The branch's factor in force.
        penalty: The factor of the penalty on surviving probabilities in force.
        is_on: Whether the branch contributes to the output.
        density: Fraction of pairs that survived the mask in the last training forward,
            a scalar tensor; zero once the branch is off.
    """

    def __init__(self, threshold: float | str | MaskThreshold) -> None:
        self.density = torch.zeros((), device="cpu")
        self.set(threshold)

    def set(
        self,
        threshold: float | str | MaskThreshold,
        weight: float = 1.0,
        penalty: float = 0.0,
    ) -> None:
        """Set threshold, weight and penalty.

        The branch is off, and computes nothing, when the threshold reaches 1 or the
        weight is 0.

        Args:
            threshold: A probability in [0, 1], or text such as ``'4/N'``.
            weight: Factor of the branch, not negative. Defaults to 1.
            penalty: Factor of the penalty on surviving probabilities, not negative;
                see :func:`masked_softmax_attention`. Defaults to 0.

        Raises:
            ValueError: If a value is out of range.
        """
        threshold = MaskThreshold.parse(threshold)
        for name, value in (("weight", weight), ("penalty", penalty)):
            if not 0.0 <= value < float("inf"):
                raise OptionError(
                    f"mask {name} {value!r} must be a finite number that is not "
                    "negative"
                )
        self.threshold = threshold
        self.weight = float(weight)
        self.penalty = float(penalty)
        # What the forward pass reads: a flag, and values in a tensor. torch.compile
        # guards on the one and not on the other, so that a schedule recompiles once.
        self.is_on = weight > 0.0 and not threshold.rejects_all
        self._state = mask_state(threshold, weight, penalty)
        if not self.is_on:
            self.density = torch.zeros_like(self.density)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, training: bool) -> Tensor:
        """The branch's output, ``weight * ([P > threshold] * P) v`` (section 3.3).

        Args:
            q, k, v: Queries and keys ``(B, h, N, d)``, values ``(B, h, N, e)``.
            training: Whether to keep the density.

        Returns:
            ``(B, h, N, e)``; float32 for half-precision inputs.
        """
        out, density = masked_softmax_with_state(q, k, v, state=self._state)
        if training:
            self.density = density
        return out
