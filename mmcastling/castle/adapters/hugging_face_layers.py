"""Layers of BEiT and Swin in transformers, whose attentions get biases as masks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid, split_heads
from mmcastling.attention.peers.softmax import SoftmaxMixer
from mmcastling.castle.adapter_registry import register_adapter
from mmcastling.castle.adapters.hugging_face import (
    CastledCopy,
    castle_interface_attention,
    copy_as,
    refuse_mask,
)
from mmcastling.castle.adapters.swin import attend_in_windows
from mmcastling.castle.castled_attention import (
    CastledAttention,
    MixerBuilder,
    forget,
    note_bias,
)
from mmcastling.errors import OptionError


class CastledBiasedLayer(CastledCopy, nn.Module):
    """What castling adds to a layer of BEiT, whatever its class."""

    has_shared_bias = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """What the layer did before.

        Raises:
            ValueError: If it is given a mask.
        """
        if not self.has_shared_bias:
            attention_mask = refuse_mask(attention_mask)
        return super().forward(hidden_states, attention_mask, **options)

    def switch_to_deploy(self) -> None:
        """Remove the bias, unless the attention is softmax."""
        if not isinstance(self.attention.mixer, SoftmaxMixer):
            self.relative_position_bias = None

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        if self.relative_position_bias is None:
            forget(state_dict, prefix, ["relative_position_bias"])
        super()._load_from_state_dict(state_dict, prefix, *args)


@register_adapter("transformers.models.beit.modeling_beit.BeitLayer")
def castle_biased_layer(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """A layer of BEiT, which computes the bias that its attention takes as a mask."""
    holders = [old, *build.holders]
    inner = replace(build, attention=old.attention, holders=holders)
    new = copy_as((CastledBiasedLayer, type(old)), old)
    new.attention = castle_interface_attention(old.attention, inner)
    new.attention.mask_is_bias = True
    mixer = new.attention.mixer
    new.has_shared_bias = any(
        getattr(holder, "shared_position_bias", None) is not None
        for holder in build.holders
    )
    if not isinstance(mixer, SoftmaxMixer):
        build.drop_shared("shared_position_bias")
    if old.relative_position_bias is not None:
        note_bias(build, mixer)
        if not mixer.uses_bias:
            new.relative_position_bias = None
    return new


class CastledSwinAttention(CastledAttention):
    """The attention in Swin's windows, castled."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in layers)
        return q, k, v

    def forward(self, x: Tensor, window: Grid, shift: Grid) -> Tensor:
        """Attend on a shifted map of whole windows, ``(B, H, W, C)`` to the same."""
        bias = self.relative_position_bias if self.bias_names else None
        y = attend_in_windows(self, x, window, shift, bias)
        return apply_layer(self.o_proj, y)


class CastledSwinLayer(CastledCopy, nn.Module):
    """What castling adds to a layer of Swin."""

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: Grid,
        always_partition: bool = False,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Tokens ``(B, H * W, C)`` to the same; there are no attention weights.

        Raises:
            ValueError: If the map is smaller than a window.
        """
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        height, width = input_dimensions
        if self.window_size != self.config_window:
            raise OptionError(
                f"a map of {height}x{width} tokens is smaller than a window of "
                f"{self.config_window}x{self.config_window}: use larger images"
            )
        x = self.layernorm_before(hidden_states).unflatten(1, input_dimensions)
        x = self.cyclic_shift(self.maybe_pad(x, height, width)[0])
        window, shift = (self.window_size,) * 2, (self.shift_size,) * 2
        x = self.cyclic_shift(self.attention(x, window, shift), reverse=True)
        x = self.dropout(x[:, :height, :width].flatten(1, 2))
        x = hidden_states + self.drop_path(x)
        return x + self.dropout(self.mlp(self.layernorm_after(x))), None


@register_adapter("transformers.models.swin.modeling_swin.SwinLayer")
def castle_swin_layer(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """A layer of Swin; what its mask forbids follows from the shift."""
    inner = old.attention
    build.note_dropout(inner.attention_dropout)
    new = copy_as((CastledSwinLayer, type(old)), old)
    window = inner.relative_position_bias.window_size
    new.attention = CastledSwinAttention(
        replace(build, attention=inner, grid=window, extra_tokens=0),
        inner.num_attention_heads,
        inner.head_dim,
        scale=inner.scaling,
        keep=("q_proj", "k_proj", "v_proj", "o_proj"),
        bias=("relative_position_bias",),
    )
    new.config_window = window[0]
    return new
