"""The ops behind ``mmcv.ops.MultiScaleDeformableAttention``.

On a CPU mmcv's class does not call them; on a GPU it does. ``value`` holds the levels'
maps, one after the other, ``(B, N, heads, d)``; ``value_spatial_shapes`` height and
width of each, ``(L, 2)``; ``value_level_start_index`` where each begins among the N;
``sampling_locations`` x and y, 0 to 1 across a level, ``(B, Q, heads, L, points, 2)``;
``attention_weights`` is ``(B, Q, heads, L, points)``. ``im2col_step`` is not used.
"""

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from mmcastling.compat.mmcv_ops.calling import register_op, widen

_INPUTS = (
    "value value_spatial_shapes value_level_start_index sampling_locations "
    "attention_weights"
)


@register_op(f"{_INPUTS} im2col_step")
def ms_deform_attn_forward(op: SimpleNamespace) -> Tensor:
    """For each query the weighted sum of its samples, ``(B, Q, heads * d)``."""
    inputs = (op.value, op.sampling_locations, op.attention_weights)
    return _attend(_levels(op), *map(widen, inputs)).to(op.value)


@register_op(
    f"{_INPUTS} grad_output grad_value grad_sampling_loc grad_attn_weight im2col_step"
)
def ms_deform_attn_backward(op: SimpleNamespace) -> None:
    """Overwrites the gradients, each shaped as what it is of."""
    targets = (op.grad_value, op.grad_sampling_loc, op.grad_attn_weight)
    if op.grad_output.numel() == 0:
        for target in targets:
            target.zero_()
        return
    inputs = [
        widen(tensor).detach().requires_grad_()
        for tensor in (op.value, op.sampling_locations, op.attention_weights)
    ]
    with torch.enable_grad():
        output = _attend(_levels(op), *inputs)
    grads = torch.autograd.grad(
        output, inputs, widen(op.grad_output), allow_unused=True, materialize_grads=True
    )
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(grad)


def _levels(op: SimpleNamespace) -> list[tuple[int, int, int]]:
    """Start, height and width of each level."""
    starts = op.value_level_start_index.tolist()
    shapes = op.value_spatial_shapes.tolist()
    return [(start, *shape) for start, shape in zip(starts, shapes, strict=True)]


def _attend(
    levels: list[tuple[int, int, int]],
    value: Tensor,
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
