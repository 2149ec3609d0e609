"""The ops behind ``mmcv.ops.MultiScaleDeformableAttention``.

On a CPU mmcv's class does not call them; on a GPU it does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmcastling.compat.mmcv_ops.widen import widen


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Stands in for ``mmcv._ext.ms_deform_attn_forward``.

    Args:
        value: The levels' maps, one after the other, ``(B, N, heads, d)``.
        value_spatial_shapes: Height and width of each level, ``(L, 2)``.
        value_level_start_index: Where each level begins among the N, ``(L,)``.
        sampling_locations: x and y, 0 to 1 across a level,
            ``(B, Q, heads, L, points, 2)``.
        attention_weights: ``(B, Q, heads, L, points)``.
        im2col_step: Images per step of the compiled op; not used.

    Returns:
        For each query the weighted sum of its samples, ``(B, Q, heads * d)``.
    """
    output = _attend(
        widen(value),
        _levels(value_spatial_shapes, value_level_start_index),
        widen(sampling_locations),
        widen(attention_weights),
    )
    return output.to(value)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Stands in for ``mmcv._ext.ms_deform_attn_backward``.

    Args:
        value: ``(B, N, heads, d)``.
        value_spatial_shapes: ``(L, 2)``.
        value_level_start_index: ``(L,)``.
        sampling_locations: ``(B, Q, heads, L, points, 2)``.
        attention_weights: ``(B, Q, heads, L, points)``.
        grad_output: ``(B, Q, heads * d)``.
        grad_value: Overwritten, shaped as ``value``.
        grad_sampling_loc: Overwritten, shaped as ``sampling_locations``.
        grad_attn_weight: Overwritten, shaped as ``attention_weights``.
        im2col_step: Images per step of the compiled op; not used.
    """
    targets = (grad_value, grad_sampling_loc, grad_attn_weight)
    if grad_output.numel() == 0:
        for target in targets:
            target.zero_()
        return
    inputs = [
        widen(tensor).detach().requires_grad_()
        for tensor in (value, sampling_locations, attention_weights)
    ]
    levels = _levels(value_spatial_shapes, value_level_start_index)
    with torch.enable_grad():
        output = _attend(inputs[0], levels, *inputs[1:])
    grads = torch.autograd.grad(
        output, inputs, widen(grad_output), allow_unused=True, materialize_grads=True
    )
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(grad)


def _levels(shapes: Tensor, starts: Tensor) -> list[tuple[int, int, int]]:
    """Start, height and width of each level."""
    return [
        (start, height, width)
        for start, (height, width) in zip(starts.tolist(), shapes.tolist(), strict=True)
    ]


def _attend(
    value: Tensor,
    levels: list[tuple[int, int, int]],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    if 0 in (batch, heads, channels, queries, points):
        return value.new_zeros(batch, queries, heads * channels)
    # grid_sample's -1..1; heads move next to the batch: (B * heads, Q, L, points, 2)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B * heads, 1, Q, L, P)
    output = value.new_zeros(batch * heads, channels, queries)
    for level, (start, height, width) in enumerate(levels):
        tokens = value[:, start : start + height * width]
        maps = tokens.permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        # (B * heads, d, Q, points)
        samples = F.grid_sample(maps, grid[:, :, level], align_corners=False)
        output = output + (samples * weights[:, :, :, level]).sum(-1)
    # (B * heads, d, Q) to (B, Q, heads * d)
    return output.view(batch, heads * channels, queries).transpose(1, 2).contiguous()
