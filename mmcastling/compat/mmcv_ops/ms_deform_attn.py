"""The ops behind ``mmcv.ops.MultiScaleDeformableAttention``.

On a GPU mmcv's class calls them; on a CPU its function in plain torch, which they run
here. ``value`` holds the levels'
maps, one after the other, ``(B, N, heads, d)``; ``value_spatial_shapes`` height and
width of each, ``(L, 2)``; ``value_level_start_index`` where each begins among the N;
``sampling_locations`` x and y, 0 to 1 across a level, ``(B, Q, heads, L, points, 2)``;
``attention_weights`` is ``(B, Q, heads, L, points)``. ``im2col_step`` is not used.
"""

import importlib
from types import SimpleNamespace

import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops.calling import register_op, widen

_INPUTS = (
    "value value_spatial_shapes value_level_start_index sampling_locations "
    "attention_weights"
)


@register_op(f"{_INPUTS} im2col_step")
def ms_deform_attn_forward(op: SimpleNamespace) -> Tensor:
    """For each query the weighted sum of its samples, ``(B, Q, heads * d)``."""
    inputs = (op.value, op.sampling_locations, op.attention_weights)
    return _attend(op, *map(widen, inputs)).to(op.value)


@register_op(
    f"{_INPUTS} grad_output grad_value grad_sampling_loc grad_attn_weight im2col_step"
)
def ms_deform_attn_backward(op: SimpleNamespace) -> None:
    """Overwrites the gradients, each shaped as what it is of."""
    targets = (op.grad_value, op.grad_sampling_loc, op.grad_attn_weight)
    inputs = [
        widen(tensor).detach().requires_grad_()
        for tensor in (op.value, op.sampling_locations, op.attention_weights)
    ]
    with torch.enable_grad():
        output = _attend(op, *inputs)
    grads = torch.autograd.grad(
        output, inputs, widen(op.grad_output), allow_unused=True, materialize_grads=True
    )
    for target, grad in zip(targets, grads, strict=True):
        target.copy_(grad)


def _attend(
    op: SimpleNamespace, value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    # mmcv.ops, which loads the ops of this module, is there by the time of a call.
    module = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    shapes = op.value_spatial_shapes.tolist()
    starts = op.value_level_start_index.tolist()
    levels = [
        value[:, start : start + height * width]
        for start, (height, width) in zip(starts, shapes, strict=True)
    ]
    return module.multi_scale_deformable_attn_pytorch(
        torch.cat(levels, 1), shapes, locations, weights
    )
