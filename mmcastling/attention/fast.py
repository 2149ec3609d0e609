"""The same results in less time. Nothing here needs to be read to follow the method.

The deployed mixture of tokens in fewer passes over memory, and linear layers that
oneDNN computes together with what follows them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.functional import (
    NORM_EPS,
    key_value_sum,
    l2_normalize,
    linear_factor,
    mean_of_tokens,
)
from mmcastling.attention.landmarks import Balance, landmark_terms
from mmcastling.attention.local_conv import Grid
from mmcastling.attention.recording import is_tracing_or_needs_grad, is_watched

# Tokens are taken so many numbers at a time, about what a CPU core's cache holds.
_CHUNK = 2**18
_LEAST_ROWS = 256

Name = tuple[str, list[float], str]
"""An activation as oneDNN is told it: name, parameters, variant."""

_ALONE: Name = ("none", [], "")


def mixed_linear_angular_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    norm_output: bool,
    residual: Tensor | None = None,
    form: str = "released",
    center_keys: bool = False,
    balance: tuple[Tensor, Tensor, Tensor] | None = None,
    reference_tokens: int | None = None,
) -> Tensor:
    """Linear-angular attention, its norm and what is added, in few passes over memory.

    Queries are not normalised: a row is taken times ``|q|`` and divided by it in the
    end, or by its own length, which does not depend on its scale. For the released form
    that is ``(pi/2) |q| v + q (k^T^ v)``. Tokens stay the outer axis in memory, so that
    heads merge without a copy. Where no graph is built, tokens are taken a few at a
    time, which the next step then finds in the cache: once for the sum over keys, once
    for the queries.

    Args:
        q, k, v, form, center_keys, balance, reference_tokens: As in
            :func:`~mmcastling.attention.functional.linear_angular_attention`.
        norm_output: Whether rows are scaled to length 1, before ``residual``.
        residual: Added to the result ``(B, h, N, e)``. Defaults to None.

    Returns:
        ``(B, h, N, e)``. For half-precision inputs float32, or half precision again
        where a residual was added and tokens were taken a few at a time.
    """
    size = _tokens_at_once(q, k, v, residual, *(balance or ()))
    center = mean_of_tokens(k) if center_keys else None
    if size is None:
        keys_values = key_value_sum(k, v, center=center)
    else:
        keys_values = sum(
            key_value_sum(keys, values, center=center)
            for keys, values in zip(k.split(size, 2), v.split(size, 2), strict=True)
        )
    own: Tensor | float | None
    mean = None
    if form == "released":
        factor = linear_factor(k, reference_tokens)
        own = 0.5
        if norm_output:  # of a row that is normalised, the scale is free
            own /= factor
        else:
            keys_values = keys_values * factor
    else:
        mean, keys_values = mean_of_tokens(v), 4 * keys_values / (v.shape[2] or 1)
        own = None
        if balance is not None:
            dtype = keys_values.dtype
            own, even, gain = (factor.to(dtype)[:, None, None] for factor in balance)
            mean, keys_values = even * mean, gain * keys_values
    terms = dict(own=own, norm_output=norm_output, directions=True)
    return _mix_in_parts(size, q, v, keys_values, mean, residual, **terms)


def mixed_landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    norm_output: bool,
    residual: Tensor | None = None,
    grid: Grid | None,
    landmarks: int,
    balance: Balance,
    sharpness: Tensor,
) -> Tensor:
    """Attention by landmarks, its norm and what is added, in few passes over memory.

    Args:
        q, k, v, grid, landmarks, balance, sharpness: As in
            :func:`~mmcastling.attention.landmarks.landmark_attention`.
        norm_output, residual: As in :func:`mixed_linear_angular_attention`.

    Returns:
        As there.
    """
    size = _tokens_at_once(q, k, v, residual, *balance, sharpness)
    mean, keys_values = landmark_terms(
        *(q, k, v),
        grid=grid,
        landmarks=landmarks,
        balance=balance,
        sharpness=sharpness,
        size=size,
    )
    own = balance[0].to(keys_values)[:, None, None]
    terms = dict(own=own, norm_output=norm_output, directions=False)
    return _mix_in_parts(size, q, v, keys_values, mean, residual, **terms)


def _mix_in_parts(
    size: int | None,
    q: Tensor,
    v: Tensor,
    keys_values: Tensor,
    mean: Tensor | None,
    residual: Tensor | None,
    **terms: Any,
) -> Tensor:
    """:func:`_mix`, of so many tokens at a time."""
    if size is None:
        return _mix(q, v, keys_values, mean, residual, **terms)
    out = keys_values.new_empty(
        v.transpose(1, 2).shape,  # tokens first
        dtype=keys_values.dtype if residual is None else v.dtype,
    ).transpose(1, 2)
    chunks = out.split(size, 2)

    def parts(x: Tensor | None) -> Sequence[Tensor | None]:
        if x is None or x.shape[2] == 1:  # the same for all
            return [x] * len(chunks)
        return x.split(size, 2)

    rows = zip(*map(parts, (q, v, mean, residual)), chunks, strict=True)
    for q, v, mean, added, chunk in rows:
        _mix(q, v, keys_values, mean, added, out=chunk, **terms)
    return out


def _tokens_at_once(*tensors: Tensor | None) -> int | None:
    """How many tokens to take at a time, or None for all."""
    v = tensors[2]
    if is_tracing_or_needs_grad(*tensors) or v.device.type != "cpu" or not v.numel():
        return None
    batch, heads, tokens, channels = v.shape
    size = max(_LEAST_ROWS, _CHUNK // (batch * heads * channels))
    return size if tokens > size else None


@in_full_precision
def _mix(
    q: Tensor,
    v: Tensor,
    keys_values: Tensor,
    mean: Tensor | None,
    residual: Tensor | None,
    *,
    own: Tensor | float | None,
    norm_output: bool,
    directions: bool,
    out: Tensor | None = None,
) -> Tensor:
    """``mean + own v + q^ keys_values``, normalised or not, plus ``residual``.

    With ``q`` itself instead of its direction ``q^``, unless ``directions``.
    """
    if not directions:
        y = (q @ keys_values).add_(mean).addcmul_(v, own)
        if norm_output:
            return l2_normalize(y, residual=residual, out=out)
        if residual is not None:
            return torch.add(y, residual, out=out)
        return y if out is None else out.copy_(y)
    length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)  # (B, h, N, 1)
    y = q @ keys_values
    if not norm_output:
        length = torch.threshold(length, NORM_EPS, math.inf)  # divides to zero
        # In place: the gradient of the division does not need its result.
        y = y / length if mean is None else torch.addcdiv(mean, y, length)
        if isinstance(own, float):
            y = y.add_(v, alpha=own)
        elif own is not None:
            y = y.addcmul_(v, own)
        if residual is not None:
            return torch.add(y, residual, out=out)
        return y if out is None else out.copy_(y)
    length = torch.threshold(length, NORM_EPS, 1.0)  # a zero row keeps v
    # In place: the gradient of the product above does not need its result.
    if isinstance(own, float):
        y = y.addcmul_(v, length, value=own)
    # Also where it follows from a size that a graph leaves open.
    elif own is not None:
        y = y.addcmul_(v, length * own)
    if mean is not None:
        y = y.addcmul_(mean, length)
    # A row with a direction is no shorter: it is |q| times one longer than NORM_EPS.
    return l2_normalize(y, residual=residual, eps=NORM_EPS**2, out=out)


def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, in one pass over memory where it can; see :func:`apply_then`."""
    return apply_then(layer, None, x)


def apply_then(layer: nn.Module, activation: nn.Module | None, x: Tensor) -> Tensor:
    """``activation(layer(x))``, in one pass over memory where :func:`one_pass` can."""
    if (function := one_pass(layer, activation, x)) is not None:
        return function(x)
    return layer(x) if activation is None else activation(layer(x))


def one_pass(
    layer: nn.Module, activation: nn.Module | None, x: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """What computes a layer and its activation at once for such inputs, or None.

    On a CPU, oneDNN adds the bias and applies the activation to what is still in the
    cache, where torch's own layers pass over memory once more. It serves exactly
    ``nn.Linear`` and ``nn.Conv2d``, which stay what they are: whatever counts, traces,
    quantises or rewrites a model finds ordinary layers. Where one is wrapped, replaced,
    hooked or patched, its weight is computed, or operations are recorded (gradients,
    graphs, modes), it is called as a module, and so is the activation. A layer of
    another class may have a method ``then(activation, x)`` of its own.
    """
    kind = type(layer)
    then, operator = getattr(kind, "then", None), _OPERATORS.get(kind)
    if then is None and operator is None:
        return None
    tensors = (x, layer.weight, layer.bias) if then is None else (x,)
    if is_tracing_or_needs_grad(*tensors) or is_watched(layer):
        return None
    if activation is not None and is_watched(activation):
        return None
    if then is not None:
        return functools.partial(then, layer, activation or _NOTHING)
    name = _ALONE if activation is None else onednn_name(activation)
    if name is None or not _onednn_takes(x, layer.weight):
        return None
    return functools.partial(operator, layer, name)


def _linear(layer: nn.Linear, name: Name, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *name)


def _convolution(layer: nn.Conv2d, name: Name, x: Tensor) -> Tensor:
    shape = layer.padding, layer.stride, layer.dilation, layer.groups
    return torch.ops.mkldnn._convolution_pointwise(
        x, layer.weight, layer.bias, *shape, *name
    )


_NOTHING = nn.Identity()
_OPERATORS = {nn.Linear: _linear, nn.Conv2d: _convolution}


class _LinearInCall(nn.Linear):
    """The class of a linear layer while another library's forward calls it."""

    def forward(self, x: Tensor) -> Tensor:
        if not onednn_serves(x, self.weight, self.bias):
            return super().forward(x)
        return _linear(self, _ALONE, x)


@contextmanager
def fused_inside(holder: nn.Module) -> Iterator[None]:
    """Let a forward that is not ours call linear layers as :func:`apply_layer` does.

    Between calls they are ``nn.Linear`` as ever.
    """
    layers = []
    if not is_tracing_or_needs_grad():
        for layer in holder._modules.values():
            if type(layer) is nn.Linear and not is_watched(layer):
                layers.append(layer)
    try:
        for layer in layers:
            layer.__class__ = _LinearInCall
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN may compute with such an input, weight and bias now."""
    recorded = is_tracing_or_needs_grad(x, weight, bias)
    return not recorded and _onednn_takes(x, weight)


def _onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused layers compute with such an input and weight now."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype == weight.dtype
        and _onednn_computes_in(x.dtype)
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_name(activation: nn.Module) -> Name | None:
    """oneDNN's name, parameters and variant of an activation; None if unknown to it."""
    if type(activation) is nn.GELU:
        return "gelu", [], activation.approximate
    # Not nn.ReLU, whose NaN oneDNN turns into 0.
    names = {nn.Identity: "none", nn.Hardswish: "hardswish"}
    name = names.get(type(activation))
    return None if name is None else (name, [], "")


@functools.cache
def _onednn_computes_in(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
