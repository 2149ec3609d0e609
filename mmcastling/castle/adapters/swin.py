"""Swin's attention in shifted windows.

A shifted window may hold regions of the image that are no neighbours, and softmax
attention masks the pairs across. Linear attention sums over the keys before it meets a
query, so no mask can come between: the shifted map is cut along the regions' borders
instead, and attention runs in rectangles that are windows or the parts of them. What a
token attends to is the same as under the mask, exactly, for every kind of attention.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import apply_layer
from mmcastling.attention.local_conv import Grid
from mmcastling.attention.mixer import Bias
from mmcastling.attention.opaque import OpaqueModule
from mmcastling.castle.adapter_registry import CannotCastle, register_adapter
from mmcastling.castle.adapters.biased import (
    TABLE,
    CastledBiasedAttention,
    table_bias,
)
from mmcastling.castle.castled_attention import CastledAttention, MixerBuilder
from mmcastling.errors import OptionError

_KEPT = ("qkv", "q_bias", "v_bias", "logit_scale", "proj", "proj_drop")
_LARGEST_LOG_SCALE = math.log(100.0)  # of SwinV2's cosines


class CastledShiftWindowMSA(OpaqueModule):
    """``ShiftWindowMSA`` of mmpretrain, mmdet and mmseg, castled.

    Args:
        old: The module as it was.
        w_msa: The castled attention within a window.
    """

    def __init__(self, old: nn.Module, w_msa: CastledAttention) -> None:
        super().__init__()
        self.w_msa = w_msa
        self.drop = old.drop
        self.window_size = old.window_size
        self.shift_size = old.shift_size
        # mmdet's and mmseg's always pad and shift; the option is mmpretrain's.
        self.pad_small_map = getattr(old, "pad_small_map", True)

    def forward(self, query: Tensor, hw_shape: Grid) -> Tensor:
        """Attend within windows, tokens ``(B, H * W, C)`` to the same.

        Raises:
            ValueError: If the map is smaller than a window and is not to be padded.
        """
        height, width = hw_shape
        window, shift = self.window_size, self.shift_size
        if min(hw_shape) <= window and not self.pad_small_map:
            if min(hw_shape) < window:
                raise OptionError(
                    f"a map of {height}x{width} tokens is smaller than a window of "
                    f"{window}x{window}: set pad_small_map=True or use larger images"
                )
            shift = 0
        x = query.unflatten(1, hw_shape)  # (B, H, W, C)
        pad = (0, 0, 0, -width % window, 0, -height % window)
        x = nn.functional.pad(x, pad)
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        attention = self.w_msa
        bias = None
        if attention.bias_names:
            bias = functools.partial(window_bias, attention)
        x = attend_in_windows(attention, x, (window, window), (shift, shift), bias)
        x = attention.proj_drop(apply_layer(attention.proj, x))
        if shift:
            x = torch.roll(x, (shift, shift), (1, 2))
        return self.drop(x[:, :height, :width].flatten(1, 2))


def attend_in_windows(
    attention: CastledAttention,
    x: Tensor,
    window: Grid,
    shift: Grid = (0, 0),
    bias: Bias | None = None,
) -> Tensor:
    """Project and mix a shifted map ``(B, H, W, C)`` of whole windows.

    Args:
        attention: The castled attention of the windows.
        x: The map, rolled by the shift.
        window: Rows and columns of a window.
        shift: By how much the map was rolled; what it brought round attends apart.
        bias: Of the logits of a whole window, ``(1, h, N, N)``.

    Returns:
        ``(B, H, W, h * e)``, not yet projected back.
    """
    grid = x.shape[1:3]
    qkv = [t.unflatten(2, grid) for t in attention.project(x.flatten(1, 2))]
    branch = getattr(attention.mixer, "branch", None)
    densities, num_pairs = [], 0
    rows, top = [], 0
    for height, tall, first_row in _bands(grid[0], window[0], shift[0]):
        columns, left = [], 0
        for width, wide, first_column in _bands(grid[1], window[1], shift[1]):
            part = (tall, wide)
            down, across = slice(top, top + height), slice(left, left + width)
            block = [_to_windows(t[:, :, down, across], part) for t in qkv]
            part_bias = None
            if bias is not None:
                corner = (first_row, first_column)
                part_bias = functools.partial(_bias_of_part, bias, window, corner, part)
            y = attention.mix(*block, grid=part, bias=part_bias)
            columns.append(_from_windows(y, (height, width), part))
            pairs = height * width * tall * wide
            num_pairs += pairs
            if branch is not None:
                densities.append(pairs * branch.density)
            left += width
        rows.append(torch.cat(columns, dim=2))
        top += height
    if branch is not None and attention.training:
        # Each call has left the density of its own rectangles.
        branch.density = sum(densities) / num_pairs
    return torch.cat(rows, dim=1)


def _bias_of_part(bias: Bias, window: Grid, corner: Grid, part: Grid) -> Tensor:
    """What a window's bias says about the tokens of one of its rectangles."""
    whole = bias()
    tokens = torch.arange(window[0] * window[1], device=whole.device).view(window)
    (top, left), (height, width) = corner, part
    tokens = tokens[top : top + height, left : left + width].flatten()
    return whole[..., tokens[:, None], tokens]


def _bands(size: int, window: int, shift: int) -> list[tuple[int, int, int]]:
    """Bands a shifted axis is cut into: length, length of windows, where in a window.

    The last window holds what the shift has brought round from the other side: its last
    ``shift`` tokens are a region of their own.
    """
    if not shift:
        return [(size, window, 0)]
    rest = window - shift
    bands = [(size - window, window, 0), (rest, rest, 0), (shift, shift, rest)]
    return [band for band in bands if band[0]]


def _to_windows(x: Tensor, window: Grid) -> Tensor:
    """``(B, h, H, W, d)`` to ``(B * windows, h, tokens of a window, d)``."""
    x = x.unflatten(3, (-1, window[1])).unflatten(2, (-1, window[0]))
    x = x.permute(0, 2, 4, 1, 3, 5, 6)  # (B, rows, columns, h, wh, ww, d)
    return x.flatten(4, 5).flatten(0, 2)


def _from_windows(y: Tensor, size: Grid, window: Grid) -> Tensor:
    """``(B * windows, h, tokens of a window, d)`` to ``(B, H, W, h * d)``."""
    rows, columns = size[0] // window[0], size[1] // window[1]
    y = y.unflatten(2, window).unflatten(0, (-1, rows, columns))
    y = y.permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, wh, columns, ww, h, d)
    return y.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def window_bias(attention: CastledAttention) -> Tensor:
    """The bias of Swin's table or of SwinV2's network, ``(1, h, N, N)``."""
    if "cpb_mlp" not in attention.bias_names:
        return table_bias(attention)
    # Of the logarithms of distances.
    table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, 2)
    bias = table[attention.relative_position_index].permute(2, 0, 1).unsqueeze(0)
    return 16 * bias.sigmoid()


class CastledCosineAttention(CastledBiasedAttention):
    """SwinV2's attention within a window, castled."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        factor = self.logit_scale.view(-1, 1, 1).clamp_max(_LARGEST_LOG_SCALE).exp()
        normalize = nn.functional.normalize
        return normalize(q, dim=-1) * factor, normalize(k, dim=-1), v


@register_adapter("mmpretrain.models.utils.attention.ShiftWindowMSA")
@register_adapter("mmdet.models.backbones.swin.ShiftWindowMSA")
@register_adapter("mmseg.models.backbones.swin.ShiftWindowMSA")
def castle_shift_window_msa(old: nn.Module, build: MixerBuilder) -> nn.Module:
    """Swin's and SwinV2's attention."""
    inner = old.w_msa
    kinds = dict(WindowMSA=CastledAttention, WindowMSAV2=CastledCosineAttention)
    kind = kinds.get(type(inner).forward.__qualname__.removesuffix(".forward"))
    if kind is None:
        raise CannotCastle(
            f"its windows use {type(inner).__name__}, not one of {list(kinds)}"
        )
    build.note_dropout(inner.attn_drop)
    w_msa = kind(
        replace(build, attention=inner),
        inner.num_heads,
        inner.embed_dims // inner.num_heads,
        scale=getattr(inner, "scale", 1.0),  # a learned one, in SwinV2
        keep=_KEPT,
        bias=(*TABLE, "cpb_mlp", "relative_coords_table"),
    )
    w_msa.training = inner.training
    return CastledShiftWindowMSA(old, w_msa)
