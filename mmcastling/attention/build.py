"""Mixers by the name that a config gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmcastling.attention.castling import CastlingMixer, LinearAngularMixer
from mmcastling.attention.mixer import TokenMixer
from mmcastling.attention.peers.efficient import EfficientMixer
from mmcastling.attention.peers.focused import FocusedMixer
from mmcastling.attention.peers.hydra import HydraMixer
from mmcastling.attention.peers.performer import PerformerMixer
from mmcastling.attention.peers.relu_linear import ReLULinearMixer
from mmcastling.attention.peers.softmax import SoftmaxMixer
from mmcastling.errors import OptionError

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


def is_castled(module: nn.Module) -> bool:
    """Whether a module mixes tokens in place of softmax attention."""
    return isinstance(module, TokenMixer) and not isinstance(module, SoftmaxMixer)


def build_mixer(
    spec: dict[str, Any] | None,
    num_heads: int,
    head_dims: int,
    *,
    key_dims: int | None = None,
    deploy: bool = False,
) -> TokenMixer:
    """Build the mixer that ``attention=dict(type=...)`` names.

    Args:
        spec: Options of the mixer; ``type`` is a key of :data:`MIXERS` and defaults to
            ``'castling'``.
        num_heads: Number of heads ``h``.
        head_dims: Channels per head of the values.
        key_dims: Those of queries and keys. Defaults to None (``head_dims``).
        deploy: Build the deployed form. Defaults to False.

    Raises:
        ValueError: If the type or an option is not known.
    """
    if spec is not None and not isinstance(spec, Mapping):
        raise OptionError(
            f"attention={spec!r}: expected options, such as dict(type='castling')"
        )
    options = dict(spec or {})
    kind = options.pop("type", "castling")
    options.pop("deploy", None)  # the backbone says it
    for name in ("num_heads", "head_dims", "key_dims"):
        if name in options:
            raise OptionError(
                f"attention of type {kind!r}: {name}={options[name]!r} follows from "
                "the network around it, leave it out"
            )
    if kind not in MIXERS:
        raise OptionError(
            f"attention type {kind!r} is not known: choose one of {sorted(MIXERS)}"
        )
    if key_dims is not None:
        options["key_dims"] = key_dims
    try:
        mixer = MIXERS[kind](num_heads, head_dims, **options)
    except TypeError as error:
        raise OptionError(f"attention of type {kind!r}: {error}") from error
    if deploy:
        if isinstance(mixer, CastlingMixer):
            mixer.set_mask(1.0)  # nothing is lost that would have to be said
        mixer.switch_to_deploy()
    return mixer
