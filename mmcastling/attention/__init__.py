"""The paper: angular attention, its linear form, and the castling block. Torch only."""

from typing import Any

from mmcastling.attention.castling import (
    CastlingAttention,
    LinearAngularAttention,
    SoftmaxAttention,
    TokenAttention,
)
from mmcastling.attention.functional import (
    angular_attention,
    angular_similarity,
    angular_similarity_series,
    linear_angular_attention,
    masked_softmax_attention,
    unit_rows,
)
from mmcastling.attention.local_conv import GridConv, TokenConv
from mmcastling.attention.threshold import MaskThreshold

__all__ = [
    "ATTENTIONS",
    "CastlingAttention",
    "GridConv",
    "LinearAngularAttention",
    "MaskThreshold",
    "SoftmaxAttention",
    "TokenAttention",
    "TokenConv",
    "angular_attention",
    "angular_similarity",
    "angular_similarity_series",
    "build_attention",
    "linear_angular_attention",
    "masked_softmax_attention",
    "unit_rows",
]

ATTENTIONS: dict[str, type[TokenAttention]] = {
    "castling": CastlingAttention,
    "linear_angular": LinearAngularAttention,
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
    options = {**defaults, **(spec or {})}
    kind = options.pop("type", "castling")
    if kind not in ATTENTIONS:
        raise ValueError(
            f"attention type {kind!r} is not known: choose one of {sorted(ATTENTIONS)}"
        )
    if kind == "castling":
        options["deploy"] = deploy
    try:
        return ATTENTIONS[kind](**options)
    except TypeError as error:
        raise ValueError(f"attention of type {kind!r}: {error}") from error
