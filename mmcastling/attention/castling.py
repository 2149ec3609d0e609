"""The castling mixer: linear-angular attention, a local convolution, and in training an
auxiliary branch of masked softmax attention (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.deploying import note
from mmcastling.attention.fast import (
    mixed_landmark_attention,
    mixed_linear_angular_attention,
)
from mmcastling.attention.functional import FORMS, linear_angular_attention
from mmcastling.attention.landmarks import landmark_attention
from mmcastling.attention.local_conv import Grid
from mmcastling.attention.masked_softmax import mask_state, masked_softmax_with_state
from mmcastling.attention.mixer import Bias, TokenMixer, check_switch
from mmcastling.attention.recording import is_transformed
from mmcastling.attention.threshold import MaskThreshold
from mmcastling.errors import OptionError, UnavailableError

MIXER_FORMS = (*FORMS, "learned", "landmarks")

MASK_RECORD = "castling_mask"
"""Where the metadata of a mixer's state dict holds the state of its branch."""

logger = logging.getLogger("mmcastling")
FORM_RECORD = "castling_form"
"""Likewise what a mixer computes and no weight shows."""

_warned: dict[str, Any] = {}


class LinearAngularMixer(TokenMixer):
    """What is deployed: linear-angular attention with a local convolution.

    Args:
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values.
        local_conv: As in :class:`TokenMixer`. Defaults to ``'token'``.
        norm_output: As in :class:`TokenMixer`. Defaults to None (True in the released
            form alone, whose magnitude depends on the number of tokens).
        form: ``'released'`` or ``'average'``, see :func:`linear_angular_attention`;
            ``'learned'``, the average form with a learned balance per head of the token
            itself, the average and the linear term, at first 0, 1 and 1; or
            ``'landmarks'``, see :func:`landmark_attention`, with a balance of the same
            kind and a learned sharpness, at first 1. Defaults to ``'released'``.
        center_keys: See :func:`linear_angular_attention`. Defaults to False.
        reference_tokens: See there. Defaults to None.
        landmarks: Regions along each side of the grid, in that form. Defaults to 8.
        **options: Further arguments of :class:`TokenMixer`.
    """

    branch: MaskedBranch | None = None
    """The auxiliary branch, which only a :class:`CastlingMixer` has, until deployed."""

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        local_conv: str | dict[str, Any] | None = "token",
        norm_output: bool | None = None,
        form: str = "released",
        center_keys: bool = False,
        reference_tokens: int | None = None,
        landmarks: int = 8,
        **options: Any,
    ) -> None:
        if form not in MIXER_FORMS:
            raise OptionError(
                f"form {form!r} is not known: choose one of {list(MIXER_FORMS)}"
            )
        if norm_output is None:
            norm_output = form == "released"
        check_switch("center_keys", center_keys)
        super().__init__(num_heads, head_dims, local_conv, norm_output, **options)
        if reference_tokens is not None and reference_tokens < 1:
            raise OptionError(
                f"reference_tokens {reference_tokens!r} must be a positive number of "
                "tokens, or None for no scaling"
            )
        if reference_tokens is not None and form != "released":
            raise OptionError(
                f"reference_tokens {reference_tokens} is for form='released'; in form "
                f"{form!r} nothing grows with the number of tokens: leave it out"
            )
        if form == "landmarks" and center_keys:
            raise OptionError(
                "center_keys is for the other forms; form='landmarks' does not see the "
                "mean of the keys, as softmax does not: leave it out"
            )
        if type(landmarks) is not int or landmarks < 1:
            raise OptionError(
                f"landmarks {landmarks!r} must be a positive number of regions along "
                "each side of the grid"
            )
        self.reference_tokens = reference_tokens
        self.form = form
        self.center_keys = center_keys
        self.landmarks = landmarks
        self.uses_grid = self.uses_grid or form == "landmarks"
        if form in ("learned", "landmarks"):
            self.own = nn.Parameter(torch.zeros(num_heads))
            self.even = nn.Parameter(torch.ones(num_heads))
            self.gain = nn.Parameter(torch.ones(num_heads))
        if form == "landmarks":
            self.sharpness = nn.Parameter(torch.ones(num_heads))
        self.register_state_dict_post_hook(_record_form)

    @property
    def described(self) -> dict[str, Any]:
        """The options on which the result depends and which no weight shows."""
        if self.form == "landmarks":
            return dict(form=self.form, landmarks=self.landmarks)
        return dict(
            form=self.form,
            center_keys=self.center_keys,
            norm_output=self.norm_output,
            reference_tokens=self.reference_tokens,
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        saved = local_metadata.get(FORM_RECORD)
        if saved not in (None, self.described) and _is_first("form", args[-1]):
            logger.warning(
                "the weights of %s were saved with %s, and are loaded with %s: it "
                "computes something else, as may others",
                *(prefix.removesuffix(".") or "the mixer", saved, self.described),
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def terms(self, grid: Grid | None) -> dict[str, Any]:
        """Arguments of :func:`linear_angular_attention` beside q, k and v, or those of
        :func:`landmark_attention`."""
        balance = None
        if self.form in ("learned", "landmarks"):
            balance = (self.own, self.even, self.gain)
        if self.form == "landmarks":
            terms = dict(grid=grid, landmarks=self.landmarks)
            return dict(terms, balance=balance, sharpness=self.sharpness)
        return dict(
            form="average" if self.form == "learned" else self.form,
            center_keys=self.center_keys,
            balance=balance,
            reference_tokens=self.reference_tokens,
        )

    @property
    def mask_is_on(self) -> bool:
        """Whether the auxiliary branch contributes to the output."""
        return self.branch is not None and self.branch.is_on

    @property
    def uses_bias(self) -> bool:
        """Whether a bias of the logits has a place: the auxiliary branch."""
        return self.branch is not None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid | None = None,
        bias: Bias | None = None,
    ) -> Tensor:
        """``normalize(linear-angular + masked softmax) + local_conv(v)``.

        Without the masked softmax, in which alone the bias acts, once its branch is off
        or removed; shapes as in :meth:`TokenMixer.forward`.
        """
        local, terms = self.convolve(v, grid), self.terms(grid)
        linear, mixed = linear_angular_attention, mixed_linear_angular_attention
        if self.form == "landmarks":
            linear, mixed = landmark_attention, mixed_landmark_attention
        if not self.mask_is_on and not is_transformed():
            # The same as below in fewer passes over memory, some of them in place.
            norm = self.norm_output
            y = mixed(q, k, v, norm_output=norm, residual=local, **terms)
            return y.to(v.dtype)
        y = linear(q, k, v, **terms)
        if not self.mask_is_on:
            return self.normalize_and_add(y, local, v.dtype)
        logits_bias = None if bias is None else bias()
        masked, density = masked_softmax_with_state(
            q, k, v, logits_bias, state=self.branch.state
        )
        if self.training and not is_transformed():
            self.branch.density = density
        return self.normalize_and_add(masked + y, local, v.dtype)

    def extra_repr(self) -> str:
        more = ", center_keys=True" if self.center_keys else ""
        if self.form == "landmarks":
            more = f", landmarks={self.landmarks}"
        return f"form={self.form!r}{more}"


class CastlingMixer(LinearAngularMixer):
    """Linear-angular mixing, and a masked softmax branch that deployment removes.

    Args:
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values.
        mask_threshold: Smallest surviving attention probability at the start, a number
            in [0, 1] or a multiple of uniform attention such as ``'4/N'``. Defaults to
            0.02, the released value.
        **options: Further arguments of :class:`LinearAngularMixer`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dims: int,
        mask_threshold: float | str | MaskThreshold = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(num_heads, head_dims, **options)
        self.branch = MaskedBranch(mask_threshold)
        self.register_state_dict_post_hook(_record_mask)

    @property
    def deploy(self) -> bool:
        """Whether the branch has been removed."""
        return self.branch is None

    def switch_to_deploy(self) -> None:
        """Remove the auxiliary branch; says so where it was on. Idempotent."""
        if self.mask_is_on:
            state = f"threshold {self.branch.threshold}, weight {self.branch.weight:g}"
            note(self, f"the auxiliary branch was on ({state}): the output changes")
        self.branch = None

    def set_mask(
        self,
        threshold: float | str | MaskThreshold,
        weight: float = 1.0,
        penalty: float = 0.0,
    ) -> None:
        """Set the branch's state, see :meth:`MaskedBranch.set`.

        Raises:
            ValueError: If a value is out of range.
            RuntimeError: If the branch has been removed.
        """
        if self.branch is None:
            raise UnavailableError(
                "the auxiliary branch of this attention has been removed by "
                "switch_to_deploy; build the model with deploy=False to train it"
            )
        self.branch.set(threshold, weight, penalty)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
    ) -> None:
        branch, record = self.branch, local_metadata.get(MASK_RECORD)
        if branch is not None and record is not None:
            branch.set(record["threshold"], record["weight"], branch.penalty)
        elif self.mask_is_on and f"{prefix}local_conv.weight" in state_dict:
            _warn_once(args[-1], prefix, branch)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        if self.branch is None:
            return f"{super().extra_repr()}, deploy=True"
        mask = f"mask_threshold={self.branch.threshold}"
        return f"{super().extra_repr()}, {mask}, mask_weight={self.branch.weight:g}"


def _record_mask(
    mixer: CastlingMixer, state_dict: Any, prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Let the state of the branch, off once it is removed, go with the weights."""
    mask = mixer.branch or MaskedBranch(1.0)
    record = dict(threshold=str(mask.threshold), weight=mask.weight)
    local_metadata[MASK_RECORD] = record


def _record_form(
    mixer: LinearAngularMixer,
    state_dict: Any,
    prefix: str,
    local_metadata: dict[str, Any],
) -> None:
    local_metadata[FORM_RECORD] = mixer.described


def _is_first(topic: str, load: Any) -> bool:
    """Whether nothing was said of a load, of which all modules share its errors."""
    first = _warned.get(topic) is not load
    _warned[topic] = load
    return first


def _warn_once(load: Any, prefix: str, branch: MaskedBranch) -> None:
    if _is_first("mask", load):
        logger.warning(
            "the weights do not say in which state the auxiliary branches of their "
            "model were: %s keeps threshold %s, and so on. Set it with "
            "mmcastling.set_mask, which for a trained model is set_mask(model, 1)",
            prefix.removesuffix(".") or "the mixer",
            branch.threshold,
        )


class MaskedBranch:
    """The state of the branch ``weight * ([P > threshold] * P) v`` (section 3.3).

    No module and without parameters or buffers, so that checkpoints, EMA and
    distributed wrappers never see one vanish. Its threshold and weight go with the
    weights as metadata of a state dict, ``state_dict()._metadata``.

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
        """Set threshold, weight and penalty; see :func:`masked_softmax_attention`.

        The branch is off, and computes nothing, when the threshold reaches 1 or the
        weight is 0.

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
        self.state = mask_state(threshold, weight, penalty)
        if not self.is_on:
            self.density = torch.zeros_like(self.density)
