"""Mixers and attention blocks by the name that a config gives them."""

from __future__ import annotations

from typing import Any

from mmcastling.attention.baselines import SoftmaxAttention, SoftmaxMixer
from mmcastling.attention.block import TokenAttention
from mmcastling.attention.castling import (
    CastlingAttention,
    CastlingMixer,
    LinearAngularAttention,
    LinearAngularMixer,
)
from mmcastling.attention.mixer import TokenMixer
from mmcastling.attention.peers import (
    EfficientAttention,
    EfficientMixer,
    FocusedAttention,
    FocusedMixer,
    HydraAttention,
    HydraMixer,
    PerformerAttention,
    PerformerMixer,
    ReLULinearAttention,
    ReLULinearMixer,
)

MIXERS: dict[str, type[TokenMixer]] = {
    "castling": CastlingMixer,
    "efficient": EfficientMixer,
    "focused": FocusedMixer,
    "hydra": HydraMixer,
    "linear_angular": LinearAngularMixer,
    "performer": PerformerMixer,
    "relu_linear": ReLULinearMixer,
    "softmax": SoftmaxMixer,
}
ATTENTIONS: dict[str, type[TokenAttention]] = {
    "castling": CastlingAttention,
    "efficient": EfficientAttention,
    "focused": FocusedAttention,
    "hydra": HydraAttention,
    "linear_angular": LinearAngularAttention,
    "performer": PerformerAttention,
    "relu_linear": ReLULinearAttention,
    "softmax": SoftmaxAttention,
}


def build_attention(
    spec: dict[str, Any] | None, *, deploy: bool = False, **defaults: Any
) -> TokenAttention:
    """Build the block that a backbone's ``attention=dict(type=...)`` names.

    Args:
        spec: Options of the block; ``type`` is a key of :data:`ATTENTIONS` and
            defaults to ``'castling'``.
        deploy: Build the pruned form of a block that has one. Defaults to False.
        **defaults: Arguments that ``spec`` may override, ``embed_dims`` and
            ``num_heads`` among them.

    Raises:
        ValueError: If the type or an option is not known.
    """
    return _build(ATTENTIONS, spec, deploy, defaults)


def build_mixer(
    spec: dict[str, Any] | None,
    *,
    deploy: bool = False,
    key_dims: int | None = None,
    **defaults: Any,
) -> TokenMixer:
    """Build a mixer alone, for a backbone with projections of its own.

    Args:
        spec: As in :func:`build_attention`; ``type`` is a key of :data:`MIXERS`.
        deploy: Build the pruned form of a mixer that has one. Defaults to False.
        key_dims: Channels per head of queries and keys, which matter to a mixer with
            weights of that size. Defaults to None (those of the values).
        **defaults: Arguments that ``spec`` may override, ``num_heads`` and
            ``head_dims`` among them.

    Raises:
        ValueError: If the type or an option is not known.
    """
    if key_dims is not None:
        kind = (spec or {}).get("type", "castling")
        if issubclass(MIXERS.get(kind, TokenMixer), (FocusedMixer, PerformerMixer)):
            defaults["key_dims"] = key_dims
    return _build(MIXERS, spec, deploy, defaults)


def _build(
    known: dict[str, Any],
    spec: dict[str, Any] | None,
    deploy: bool,
    defaults: dict[str, Any],
) -> Any:
    options = {**defaults, **(spec or {})}
    kind = options.pop("type", "castling")
    if kind not in known:
        raise ValueError(
            f"attention type {kind!r} is not known: choose one of {sorted(known)}"
        )
    if issubclass(known[kind], CastlingMixer):
        options["deploy"] = deploy
    try:
        return known[kind](**options)
    except TypeError as error:
        raise ValueError(f"attention of type {kind!r}: {error}") from error
