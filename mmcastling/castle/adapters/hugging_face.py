"""Attentions of Hugging Face transformers, castled through its attention interface.

An attention there projects tokens, may rotate them, and leaves the rest to a function
that its config names. A castled one is of a subclass of its own class, runs the forward
that it had, and has a config of its own that names the function below; so one piece of
code serves every model of vision that uses the interface. Its mixer is a submodule,
which ``save_pretrained`` keeps.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention import TokenMixer
from mmcastling.attention.fast import apply_layer, fused_inside
from mmcastling.attention.local_conv import merge_heads, split_heads
from mmcastling.attention.opaque import OpaqueModule
from mmcastling.castle.adapter_registry import (
    CannotCastle,
    leave_alone,
    register_adapter,
)
from mmcastling.castle.adapters.map_attention import check_output_attentions
from mmcastling.castle.castled_attention import (
    CastledAttention,
    MixerBuilder,
)
from mmcastling.castle.swap import castle
from mmcastling.errors import CheckpointError, OptionError

INTERFACE = "mmcastling"
"""The name of our function in ``transformers.AttentionInterface``."""

# Arguments of a forward by which it attends to other tokens than its own.
_OTHER_KEYS = {
    *("key", "value", "key_value_states", "encoder_hidden_states", "past_key_values"),
    *("key_states", "current_states", "memory", "context", "inputs_kv"),
}
# Settings by which an attention differs, and how.
_UNLIKE = {
    "num_key_value_groups": "its heads share keys",
    "sequence_reduction_ratio": "its keys are spatially reduced",
    "query_stride": "its queries are pooled",
    "sliding_window": "it slides a window",
}
# A config that has one of these is of a model that cuts images into patches.
_OF_PATCHES = ("patch_size", "patch_sizes")
_HEADS = ("num_attention_heads", "num_heads")
_WIDTHS = ("head_dim", "attention_head_size")
# Sequences that lead or follow the patches, by the names of their embeddings.
_LEADING = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
_TRAILING = ("detection_tokens",)


def uses_interface(kind: type[nn.Module]) -> bool:
    """Whether a class of attention leaves mixing to what its config names."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def refuse_mask(mask: Tensor | None) -> None:
    """Raise OptionError if an attention is given a mask."""
    # Where a graph is exported, transformers passes one that masks nothing if it is
    # given none; values, which could tell, are not there yet.
    if mask is not None and not torch.compiler.is_exporting():
        raise OptionError(
            "a castled attention takes no attention_mask: linear attention sums over "
            "all tokens before it sees a query. Leave the mask out, or keep the "
            "attention softmax by castle's keep or predicate"
        )


class CastledCopy:
    """What is of a class made of ours and the original's, which copies find again."""

    def __reduce__(self) -> Any:
        return _revive, (type(self).__bases__,), vars(self)


class CastledInterfaceAttention(CastledCopy, CastledAttention):
    """What castling adds to an attention that uses the interface, whatever its class.

    Instances are of classes that derive from this one and the attention's own.
    """

    mask_is_bias = False
    """Whether what comes as a mask is a bias of relative positions."""

    num_trailing = 0
    """How many of the extra tokens come after those of the grid."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention did before, with :func:`mix_states` in its midst."""
        with fused_inside(self):
            return super(OpaqueModule, self).forward(*args, **kwargs)

    def mix_states(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, mask: Any
    ) -> Tensor:
        """Mix what was projected, ``(B, h, N, d)`` each, to ``(B, N, h, d)``."""
        if not self.mask_is_bias:
            mask = refuse_mask(mask)
        factor = 1.0 if scaling is None else scaling * math.sqrt(self.key_dims)
        if not math.isclose(factor, 1.0):
            q = q * factor
        moved = self.num_trailing if self.mixer.uses_grid else 0
        if moved:  # a convolution on the grid takes the last tokens for its own
            q, k, v = (t.roll(moved, 2) for t in (q, k, v))
        y = self.mix(q, k, v) if mask is None else self._mix_biased(q, k, v, mask)
        return (y.roll(-moved, 2) if moved else y).transpose(1, 2)

    def _mix_biased(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        grid = self._grid_for_mixer(v.shape[2])
        y = self.mixer(q, k, v, grid, lambda: bias)
        if self.training and not getattr(self.mixer, "mask_is_on", False):
            y = y + 0.0 * bias.sum()  # distributed training waits for its gradient
        return y


def mix_states(
    attention: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What the interface calls; there are no attention weights to give back.

    Raises:
        ValueError: If the attention has not been castled, or is given a mask.
    """
    if not isinstance(attention, CastledInterfaceAttention):
        raise OptionError(
            f"attn_implementation={INTERFACE!r} is for what castle() has castled, not "
            f"for a {type(attention).__name__}: leave it out and castle the model"
        )
    return attention.mix_states(query, key, value, scaling, attention_mask), None


@register_adapter(uses_interface)
def castle_interface_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The attention of any model of transformers over patches that uses its seam."""
    _check_patches(old)
    for name in ("attention_dropout", "dropout_prob", "dropout"):
        build.note_dropout(getattr(old, name, 0.0))
    build.extra_tokens, trailing = _count_extra_tokens(build.holders)
    heads, width = _first(old, *_HEADS), _first(old, *_WIDTHS)
    frame = CastledAttention(build, heads, width)
    new = copy_as((CastledInterfaceAttention, type(old)), old)
    ordinary = vars(nn.Module())
    vars(new).update({k: v for k, v in vars(frame).items() if k not in ordinary})
    new.mixer, new.num_trailing = frame.mixer, trailing
    new.config = copy.copy(old.config)
    new.config._attn_implementation = {"": INTERFACE}  # of no config inside
    return new


def _check_patches(attention: nn.Module) -> None:
    """Raise CannotCastle unless it attends from an image's patches to themselves."""
    if getattr(attention, "is_causal", False) is True:
        raise CannotCastle("it is causal: linear attention sums over all tokens")
    named = set(inspect.signature(type(attention).forward).parameters) & _OTHER_KEYS
    if named:
        raise CannotCastle(
            f"it is given keys of other tokens ({', '.join(sorted(named))}): only "
            "self-attention is castled"
        )
    for name, why in _UNLIKE.items():
        value = getattr(attention, name, None)
        if value is not None and value != 1:
            raise CannotCastle(f"{why} ({name}={value})")
    if not any(hasattr(attention.config, name) for name in _OF_PATCHES):
        raise CannotCastle(
            "it is no attention over an image's patches (its config has no "
            "patch_size), and others come with masks"
        )
    for names in (_HEADS, _WIDTHS):
        if _first(attention, *names) is None:
            raise CannotCastle(f"it has none of {', '.join(names)}")


def _first(module: nn.Module, *names: str) -> Any:
    return next((v for n in names if (v := getattr(module, n, None)) is not None), None)


def _count_extra_tokens(holders: Sequence[nn.Module]) -> tuple[int, int]:
    """How many tokens are not on the grid, and how many of them come after it.

    By the embeddings in the nearest holder with a convolution, which makes the patches.
    """
    for holder in holders:
        if any(isinstance(module, nn.Conv2d) for module in holder.modules()):
            counts = {"": 0}
            for name, tokens in holder.named_parameters():
                count = tokens.shape[-2] if tokens.ndim > 1 else 1
                counts[name.rpartition(".")[2]] = count
            trailing = sum(counts.get(name, 0) for name in _TRAILING)
            return trailing + sum(counts.get(name, 0) for name in _LEADING), trailing
    return 0, 0


def copy_as(bases: tuple[type[nn.Module], ...], old: nn.Module) -> nn.Module:
    """A module of those classes that holds what another does, in dicts of its own."""
    new = _revive(bases)
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    vars(new).update({k: copy.copy(v) if k in own else v for k, v in vars(old).items()})
    return new


def _revive(bases: tuple[type[nn.Module], ...]) -> nn.Module:
    """A module of a castled class, without contents; the interface knows us then."""
    modeling = sys.modules["transformers.modeling_utils"]
    modeling.AttentionInterface.register(INTERFACE, mix_states)
    kind = _castled_class(bases)
    return kind.__new__(kind)


@functools.cache
def _castled_class(bases: tuple[type[nn.Module], ...]) -> type[nn.Module]:
    return type(f"Castled{bases[1].__name__}", bases, {"__module__": __name__})


def castled_from_pretrained(
    kind: type[nn.Module], folder: str, **options: Any
) -> nn.Module:
    """Load what ``save_pretrained`` wrote of a castled model.

    A file of tensors does not say in which state the masks were: the branches are as
    ``options`` say, and on unless ``mask_threshold=1`` or ``deploy=True``.

    Args:
        kind: The model's class in transformers.
        folder: The folder, or any other name that ``kind.from_pretrained`` takes.
        **options: Those that :func:`mmcastling.castle` was called with.

    Returns:
        The model, castled, in evaluation.

    Raises:
        CheckpointError: If the weights lack some of what castling added, which then
            would have no values.
    """

    def build(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        kind.__init__(model, *args, **kwargs)
        castle(model, **options)

    # transformers knows by the names of class and module how weights were renamed.
    names = {"__init__": build, "__module__": kind.__module__}
    built = type(kind.__name__, (kind,), names)
    model, found = built.from_pretrained(folder, output_loading_info=True)
    mixers = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, TokenMixer)
    )
    missing = sorted(n for n in found["missing_keys"] if n.startswith(mixers))
    if missing:
        more = f" and {len(missing) - 4} more" if missing[4:] else ""
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing[:4])}{more}: it is of a model that was "
            "not castled, or with other options. Give those that castle() had, or load "
            f"it as {kind.__name__}.from_pretrained does, and castle it then"
        )
    model.__class__ = kind
    return model


# -- attentions that do not use the interface ------------------------------------------


class CastledWindowedAttention(CastledAttention):
    """The attention of RF-DETR's DINOv2, castled; all tokens or those of a window."""

    def forward(
        self, hidden_states: Tensor, output_attentions: bool = False
    ) -> tuple[Tensor, None]:
        """Attend without projecting back, ``(B, N, C)`` to the same and None."""
        check_output_attentions(output_attentions)
        layers = (self.query, self.key, self.value)
        q, k, v = (
            split_heads(apply_layer(layer, hidden_states), self.num_heads)
            for layer in layers
        )
        return merge_heads(self.mix(q, k, v)), None


_RFDETR = "rfdetr.models.backbone.dinov2_with_windowed_attn"


@register_adapter(f"{_RFDETR}.Dinov2WithRegistersSelfAttention")
@register_adapter(f"{_RFDETR}.Dinov2WithRegistersSdpaSelfAttention")
def castle_windowed_attention(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """The attention of RF-DETR's backbone."""
    build.note_dropout(old.dropout)
    build.off_grid = "RF-DETR orders tokens by windows, each with a class token"
    return CastledWindowedAttention(
        build,
        old.num_attention_heads,
        old.attention_head_size,
        keep=("query", "key", "value"),
    )


# What transformers calls attention and castling leaves alone, by the reason.
_LEFT_ALONE = {
    "its keys and values are fewer than its queries (spatially reduced)": (
        "cvt.modeling_cvt.CvtAttention",
        "glpn.modeling_glpn.GLPNAttention",
        "pvt.modeling_pvt.PvtAttention",
        "pvt_v2.modeling_pvt_v2.PvtV2SelfAttention",
    ),
    "attention pooling: one query, or a few that are learned": (
        "siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead",
        "siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead",
    ),
    "it attends to a neighbourhood": ("dinat.modeling_dinat.NeighborhoodAttention",),
    "already linear in tokens": (
        "mobilevitv2.modeling_mobilevitv2.MobileViTV2LinearSelfAttention",
    ),
    "channel attention: it mixes channels, at a cost linear in tokens": (
        "florence2.modeling_florence2.Florence2VisionChannelAttention",
    ),
}
for _reason, _names in _LEFT_ALONE.items():
    for _name in _names:
        leave_alone(f"transformers.models.{_name}", _reason)
