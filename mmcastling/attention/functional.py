"""Castling-ViT's attention as functions of tensors (paper, sections 3.2 and 3.3).

Shapes throughout: ``B`` images, ``h`` heads, ``N`` tokens, ``d`` and ``e`` channels per
head. Half-precision inputs are computed and returned in float32, because the linear
term grows with ``N`` beyond what float16 holds; the block normalises it afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmcastling.attention.threshold import MaskThreshold

# Rows shorter than this have no direction that float32 could tell: they count as zero.
NORM_EPS = 1e-12

# Tokens are taken so many numbers at a time, about what a CPU core's cache holds.
_CHUNK = 2**18
_LEAST_ROWS = 256


Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast leaves operations on a device as they are."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    ):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # it is off, or there is none, as on the meta device


def in_full_precision(function: Function) -> Function:
    """Run on float32 copies of half-precision tensors, untouched by autocast."""

    @functools.wraps(function)
    def wrapped(*tensors: Tensor, **options: Any) -> Any:
        half = (torch.float16, torch.bfloat16)
        tensors = tuple(t.float() if t.dtype in half else t for t in tensors)
        with without_autocast(tensors[0].device):
            return function(*tensors, **options)

    return wrapped  # type: ignore[return-value]


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether operations become a graph: compiled, traced, exported, or of gradients.

    Args:
        tensors: What the operations would take.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


@in_full_precision
def unit_rows(x: Tensor, *, plus: Tensor | None = None) -> Tensor:
    """L2-normalise the last axis; a zero row stays zero, with a zero gradient.

    Args:
        x: A tensor of any shape. Half precision is computed in float32.
        plus: Added to the result, in the same pass over memory. Defaults to None.

    Returns:
        A tensor of the same shape whose rows have length 1 or 0, where nothing is
        added.
    """
    return _to_unit(x, NORM_EPS, plus)


def _to_unit(
    x: Tensor, smallest: float, plus: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Scale rows to length 1; those up to ``smallest`` long become zero."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    length = torch.threshold(length, smallest, math.inf)  # divides to zero
    if plus is None:
        return torch.div(x, length, out=out)
    return torch.addcdiv(plus.to(x.dtype), x, length, out=out)


@in_full_precision
def kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose weights are ``<q_i, k_j> / sum_j <q_i, k_j>``, in O(N).

    Args:
        q: Features of the queries ``(B, h, N, m)``, none negative.
        k: Features of the keys ``(B, h, M, m)``, none negative.
        v: Values ``(B, h, M, e)``.

    Returns:
        ``(B, h, N, e)``; zero for a query that is similar to no key.
    """
    weighted = q @ (k.transpose(-2, -1) @ v)
    total = q @ k.sum(dim=-2).unsqueeze(-1)  # (B, h, N, 1)
    return torch.where(total > NORM_EPS, weighted / total.clamp_min(NORM_EPS), 0.0)


def angular_similarity(q: Tensor, k: Tensor) -> Tensor:
    """The angular kernel ``Sim(q, k) = 1 - arccos(<q^, k^>) / pi`` of every pair.

    Args:
        q: Queries ``(..., N, d)``.
        k: Keys ``(..., M, d)``.

    Returns:
        Similarities ``(..., N, M)`` in [0, 1].
    """
    cosine = unit_rows(q) @ unit_rows(k).transpose(-2, -1)
    return 1.0 - torch.arccos(cosine.clamp(-1.0, 1.0)) / math.pi


def angular_similarity_series(q: Tensor, k: Tensor, order: int) -> Tensor:
    """The kernel's expansion up to the given order of its residual (paper, eq. 5).

    ``1/2 + c/pi + (1/pi) sum_{i=1}^{order} (2i)! / (4^i (i!)^2 (2i+1)) c^(2i+1)`` with
    ``c = <q^, k^>``. Order 0 leaves the linear terms, which is what inference keeps.

    Args:
        q: Queries ``(..., N, d)``.
        k: Keys ``(..., M, d)``.
        order: Number of terms of the high-order residual.

    Returns:
        Similarities ``(..., N, M)``.
    """
    c = unit_rows(q) @ unit_rows(k).transpose(-2, -1)
    total = 0.5 + c / math.pi
    coefficient = 1.0  # (2i)! / (4^i (i!)^2)
    for i in range(1, order + 1):
        coefficient *= (2 * i - 1) / (2 * i)
        total = total + coefficient / (2 * i + 1) * c ** (2 * i + 1) / math.pi
    return total


@in_full_precision
def angular_attention(
    q: Tensor, k: Tensor, v: Tensor, *, literal_constant: bool = False
) -> Tensor:
    """Attention with the exact angular kernel, in O(N^2): the oracle for the rest.

    The kernel's constant 1/2 is applied to the token itself, as the authors' released
    block does; read literally it would weigh every token, ``1/2 sum_j v_j``.

    Args:
        q: Queries ``(B, h, N, d)``.
        k: Keys ``(B, h, N, d)``.
        v: Values ``(B, h, N, e)``.
        literal_constant: Sum the constant over all tokens instead. Defaults to False.

    Returns:
        ``(B, h, N, e)``, not divided by the row sums of the kernel.
    """
    similarity = angular_similarity(q, k)
    if literal_constant:
        return similarity @ v
    return 0.5 * v + (similarity - 0.5) @ v


@in_full_precision
def linear_angular_attention(
    q: Tensor, k: Tensor, v: Tensor, *, reference_tokens: int | None = None
) -> Tensor:
    """The linear terms of angular attention, ``1/2 v + (1/pi) q^ (k^T^ v)``, in O(N).

    The constant term acts on the token itself, as in the authors' released block (see
    :func:`angular_attention` for the literal reading).

    Args:
        q: Queries ``(B, h, N, d)``.
        k: Keys ``(B, h, N, d)``.
        v: Values ``(B, h, N, e)``.
        reference_tokens: Scale the second term by ``reference_tokens / N``. That term
            is a sum over the tokens while the first is not, so the balance learned at
            one resolution shifts at another; naming the number of tokens of training
            keeps it. Defaults to None (no scaling, as released).

    Returns:
        ``(B, h, N, e)``; float32 for half-precision inputs.
    """
    key_value = _key_value(k, v) * _factor(k, reference_tokens)
    return 0.5 * v + unit_rows(q) @ key_value


def linear_angular_direction(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    reference_tokens: int | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """``unit_rows(linear_angular_attention(q, k, v))`` without normalising queries.

    A row's direction does not depend on its scale, so the row is taken times ``|q|``
    and over the product's factor: ``(pi/2) |q| v + q (k^T^ v)``. Tokens stay the outer
    axis in memory where they are in ``plus``, so that heads merge without a copy. Where
    nothing is recorded, tokens are taken a few at a time, whose steps find them in the
    cache: once for the sum over keys, once for the queries.

    Args:
        q: Queries ``(B, h, N, d)``.
        k: Keys ``(B, h, N, d)``.
        v: Values ``(B, h, N, e)``.
        reference_tokens: As in :func:`linear_angular_attention`.
        plus: Added to the result ``(B, h, N, e)``, as in :func:`unit_rows`; may hold
            the result afterwards, which saves memory.

    Returns:
        ``(B, h, N, e)`` with rows of length 1 or 0, where nothing is added; float32 for
        half-precision inputs, unless it is ``plus``.
    """
    weight = 0.5 / _factor(k, reference_tokens)
    at_once = _tokens_at_once(q, k, v, plus)
    if at_once is None:
        return _direction(q, v, _key_value(k, v), weight=weight, plus=plus)
    keys, values = k.split(at_once, 2), v.split(at_once, 2)
    key_value = sum(map(_key_value, keys, values))
    if plus is None:
        tokens_first = v.transpose(1, 2).shape
        out = key_value.new_empty(tokens_first).transpose(1, 2)
    else:
        out = plus
    chunks = zip(q.split(at_once, 2), values, out.split(at_once, 2), strict=True)
    for queries, value, chunk in chunks:
        added = None if plus is None else chunk
        _direction(queries, value, key_value, weight=weight, plus=added, out=chunk)
    return out


def _tokens_at_once(q: Tensor, k: Tensor, v: Tensor, plus: Tensor | None) -> int | None:
    """How many tokens to take at a time; None for all, or if steps are recorded."""
    if is_recorded(q, k, v, plus) or v.device.type != "cpu" or not v.numel():
        return None
    if plus is not None and (plus.dtype != v.dtype or plus.shape != v.shape):
        return None  # it could not hold the result
    batch, heads, tokens, channels = v.shape
    at_once = max(_LEAST_ROWS, _CHUNK // (batch * heads * channels))
    return at_once if tokens > at_once else None


@in_full_precision
def _direction(
    q: Tensor,
    v: Tensor,
    key_value: Tensor,
    *,
    weight: float,
    plus: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """``unit_rows(weight |q| v + q key_value)``, and ``plus``."""
    length = torch.linalg.vector_norm(q, dim=-1, keepdim=True)  # (B, h, N, 1)
    length = torch.threshold(length, NORM_EPS, 1.0)  # a zero row keeps v
    y = q @ key_value
    y = y.addcmul_(v, length, value=weight)  # the product's gradient needs it not
    # No row that has a direction is shorter: it is |q| times one above NORM_EPS.
    return _to_unit(y, NORM_EPS * NORM_EPS, plus, out)


@in_full_precision
def _key_value(k: Tensor, v: Tensor) -> Tensor:
    """``k^T^ v`` of every head, ``(B, h, d, e)``."""
    return _to_unit(k, NORM_EPS).transpose(-2, -1) @ v


def _factor(k: Tensor, reference_tokens: int | None) -> float:
    """The factor of ``q^ (k^T^ v)``."""
    if reference_tokens is None:
        return 1.0 / math.pi
    return reference_tokens / (math.pi * k.shape[-2])


@in_full_precision
def naive_masked_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float | str | MaskThreshold = 0.02,
    weight: float = 1.0,
    return_density: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The auxiliary branch as the paper writes it: the oracle for the bounded form.

    Keeps ``(B, h, N, M)`` matrices for the backward pass.

    Args:
        q: Queries ``(B, h, N, d)``.
        k: Keys ``(B, h, M, d)``.
        v: Values ``(B, h, M, e)``.
        threshold: As in :func:`masked_softmax_attention`. Defaults to 0.02.
        weight: Factor of the branch. Defaults to 1.
        return_density: Also return the fraction of pairs that survive. Defaults to
            False.

    Returns:
        ``(B, h, N, e)``; float32 for half-precision inputs. With ``return_density`` a
        pair of that and a scalar tensor.
    """
    threshold = MaskThreshold.parse(threshold)
    probability = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    mask = probability > threshold.resolve(k.shape[-2])
    out = weight * (torch.where(mask, probability, 0.0) @ v)
    if return_density:
        return out, mask.mean(dtype=torch.float32)
    return out
