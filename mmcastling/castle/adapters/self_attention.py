"""``nn.MultiheadAttention`` where it attends from tokens to themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.castle.adapter_registry import CannotCastle, register_adapter
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder
from mmcastling.errors import OptionError

_NAMES = {
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "out_proj.weight": "proj.weight",
    "out_proj.bias": "proj.bias",
}


class _FromMultiheadAttention(CastledAttention):
    """Takes weights under the names of ``nn.MultiheadAttention`` too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._register_load_state_dict_pre_hook(_rename_on_load)


def _rename_on_load(state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for was, name in _NAMES.items():
        for inside in (prefix, f"{prefix}attn."):  # torch's module, or mmcv's
            if f"{inside}{was}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(f"{inside}{was}")


class CastledSelfAttention(_FromMultiheadAttention):
    """``nn.MultiheadAttention`` as self-attention, castled."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """Attend, ``(B, N, C)`` three times the same to ``(B, N, C)`` and None.

        Raises:
            ValueError: If the three differ, or a mask or the weights are asked for.
        """
        _check_self_attention(query, key, value, options)
        return apply_layer(self.proj, self.attend(query)), None


class CastledResidualAttention(_FromMultiheadAttention):
    """mmcv's ``MultiheadAttention`` as self-attention, castled."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend, and add ``identity``, ``(B, N, C)`` to the same.

        Raises:
            ValueError: If keys or values are not the queries, or a mask or positions
                are given.
        """
        key = query if key is None else key
        _check_self_attention(query, key, key if value is None else value, options)
        y = self.dropout_layer(
            self.proj_drop(apply_layer(self.proj, self.attend(query)))
        )
        return (query if identity is None else identity) + y


def _check_self_attention(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> None:
    given = [name for name, v in options.items() if v is not None and v is not False]
    # Backward hooks make three tensors of one, in the same memory.
    same = all(x is query or x.is_set_to(query) for x in (key, value))
    if given or not same:
        raise OptionError(
            "a castled nn.MultiheadAttention attends from tokens to themselves, "
            f"without masks and weights; it was given {given or 'other keys'}. "
            "Leave it out with castle's predicate"
        )


@register_adapter(
    "torch.nn.modules.activation.MultiheadAttention",
    inside="torchvision.models.vision_transformer.EncoderBlock",
)
def castle_torch_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """``nn.MultiheadAttention`` in torchvision's ViT; ``in_proj`` becomes ``qkv``."""
    if not old.batch_first:
        raise CannotCastle("it is not batch_first")
    build.note_dropout(old.dropout)
    layers = _layers_of(old)
    return CastledSelfAttention(build, old.num_heads, old.head_dim, **layers)


@register_adapter(
    "mmcv.cnn.bricks.transformer.MultiheadAttention",
    inside="mmseg.models.backbones.vit.TransformerEncoderLayer",
)
@register_adapter(
    "mmcv.cnn.bricks.transformer.MultiheadAttention",
    inside="mmpretrain.models.backbones.tnt.TransformerBlock",
)
def castle_residual_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """mmcv's attention in mmseg's ``VisionTransformer`` and mmpretrain's TNT."""
    inner = old.attn
    if not old.batch_first:
        raise CannotCastle("it is not batch_first")
    build.note_dropout(inner.dropout)
    layer = build.holders[1] if len(build.holders) > 1 else None
    if getattr(layer, "inner_block", None) is build.holders[0]:
        # TNT's pixels of a patch
        (tnt,) = (h for h in build.holders if hasattr(h, "pixel_embed"))
        build.extra_tokens, build.grid = 0, tuple(tnt.pixel_embed.new_patch_size)
    layers = _layers_of(inner)
    layers.update(proj_drop=old.proj_drop, dropout_layer=old.dropout_layer)
    return CastledResidualAttention(build, inner.num_heads, inner.head_dim, **layers)


def _layers_of(attention: nn.MultiheadAttention) -> dict[str, nn.Module]:
    """Its projections as ``qkv`` and ``proj``, of the same parameters."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise CannotCastle("it has separate projections or added keys")
    qkv = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    qkv.weight, qkv.bias = weight, bias
    return dict(qkv=qkv, proj=attention.out_proj)
