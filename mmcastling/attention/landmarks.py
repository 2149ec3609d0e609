"""The linear terms of softmax itself, around landmarks, in O(N): the form for trained
weights.

The angular kernel is expanded around a right angle, the same for all queries. Softmax
attention of trained weights is peaked, and queries of one region of an image are alike:
expanded around the mean query of each region it keeps far more of itself. Landmarks as
in Nyströmformer (Xiong et al., 2021), the first order is what they leave out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmcastling.attention.autocast import in_full_precision, without_autocast
from mmcastling.attention.local_conv import (
    Grid,
    count_extra,
    merge_heads,
    split_heads,
)
from mmcastling.attention.recording import is_tracing_or_needs_grad
from mmcastling.errors import OptionError

Balance = tuple[Tensor, Tensor, Tensor]


def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid | None,
    landmarks: int,
    balance: Balance | None = None,
    sharpness: Tensor | None = None,
) -> Tensor:
    """Softmax attention to the first order around landmark queries, in O(N).

    Landmarks are the mean queries ``p_r`` of ``landmarks x landmarks`` regions of the
    grid, and each token outside it for itself. Every landmark attends to all keys,
    ``a_r = softmax(sharpness p_r k^T / sqrt(d))``. Between them attention is linear in
    the query:

    ``own v_i + even (a v)~_i + gain (q_i - p~_i) C / sqrt(d)``

    where ``~_i`` interpolates what landmarks have (bilinearly, between the centres of
    regions), and ``C`` is a covariance of keys and values: that under the mean of
    ``a_r`` over a block of 2x2 regions, the mean over the blocks. With factors 0, 1 and
    1 and sharpness 1 a query that is its landmark has exactly what softmax attention
    gives it, and one near it nearly so.

    Args:
        q: Queries ``(B, h, N, d)``, of which the last ``H * W`` fill the grid row by
            row.
        k: Keys ``(B, h, N, d)``.
        v: Values ``(B, h, N, e)``.
        grid: ``(H, W)`` of the tokens.
        landmarks: Regions along each side of the grid.
        balance: The factors ``own``, ``even`` and ``gain``, each ``(h,)``. Defaults to
            None (0, 1 and 1).
        sharpness: ``(h,)``. Defaults to None (1).

    Returns:
        ``(B, h, N, e)``; float32 for half-precision inputs.

    Raises:
        ValueError: If ``grid`` is missing or holds more than ``N`` tokens.
    """
    at_landmarks, keys_values = landmark_terms(
        *(q, k, v),
        grid=grid,
        landmarks=landmarks,
        balance=balance,
        sharpness=sharpness,
    )
    mean, own = interpolate(at_landmarks, grid=grid, landmarks=landmarks), 0.0
    if balance is not None:
        own = balance[0].to(mean)[:, None, None]
    with without_autocast(q.device):
        return own * v + mean + q.to(mean) @ keys_values


def landmark_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Grid | None,
    landmarks: int,
    balance: Balance | None = None,
    sharpness: Tensor | None = None,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`landmark_attention` sums over keys, so many of them at a time.

    Args:
        q, k, v, grid, landmarks, balance, sharpness: As there.
        size: How many keys at a time. Defaults to None (all).

    Returns:
        ``even a_r v - p_r C'`` of each landmark, ``(B, h, R, e)``, tokens outside the
        grid first, and ``C' = gain C / sqrt(d)``, ``(B, h, d, e)``: interpolated, the
        one is what ``q_i C'`` is added to.
    """
    if grid is None:
        raise OptionError(
            f"form='landmarks' got {q.shape[2]} tokens without their grid: pass "
            "grid=(H, W), or use form='learned' with center_keys=True, which needs none"
        )

    def parts(x: Tensor, axis: int) -> Sequence[Tensor]:
        return [x] if size is None else x.split(size, axis)

    with without_autocast(q.device):
        extra, scale = count_extra(q.shape[2], grid), q.shape[3] ** -0.5
        queries = pool(q, grid=grid, landmarks=landmarks)
        sharp = scale * queries
        if sharpness is not None:
            sharp = sharp * sharpness.to(sharp)[:, None, None]
        logits = torch.cat([_dot(sharp, keys) for keys in parts(k, 2)], dim=3)
        attention = torch.softmax(logits, dim=3)
        some = zip(parts(k, 2), parts(v, 2), parts(attention, 3), strict=True)
        sums = [_sums(*part, extra=extra, landmarks=landmarks) for part in some]
        values, keys, products = (
            functools.reduce(torch.add, terms) for terms in zip(*sums, strict=True)
        )
        # The mean over blocks of E[k v] - E[k] E[v].
        of_blocks = _each(_weights(_blocks, values, landmarks), values[:, :, extra:])
        apart = keys.transpose(2, 3) @ of_blocks / of_blocks.shape[2]
        keys_values = scale * (products - apart)
        if balance is not None:
            _, even, gain = (factor.to(values)[:, None, None] for factor in balance)
            values, keys_values = even * values, gain * keys_values
        return values - queries @ keys_values, keys_values


@in_full_precision
def _dot(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(2, 3)


@in_full_precision
def _sums(
    k: Tensor, v: Tensor, attention: Tensor, *, extra: int, landmarks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over keys: ``a v`` of all landmarks, ``a k`` and ``k^T v`` of blocks."""
    blocks = _each(_weights(_blocks, attention, landmarks), attention[:, :, extra:])
    shares = blocks.mean(2).unsqueeze(3)  # (B, h, n, 1)
    return attention @ v, blocks @ k, (shares * k).transpose(2, 3) @ v


@in_full_precision
def pool(x: Tensor, *, grid: Grid, landmarks: int) -> Tensor:
    """Means over the regions of a grid, as of torch's adaptive average pooling.

    ``(B, h, N, d)`` to ``(B, h, E + landmarks**2, d)``; the ``E`` tokens outside the
    grid lead, and stay as they are.
    """
    extra = count_extra(x.shape[2], grid)
    rows, columns = (_weights(_pooling, x, side, landmarks) for side in grid)
    maps = merge_heads(x[:, :, extra:]).unflatten(1, grid)  # (B, H, W, C)
    maps = _each(rows, _each(columns, maps).flatten(2))  # (B, landmarks, landmarks * C)
    means = maps.unflatten(2, (landmarks, -1)).flatten(1, 2)
    means = split_heads(means, x.shape[1])
    return torch.cat([x[:, :, :extra], means], dim=2) if extra else means


@in_full_precision
def interpolate(x: Tensor, *, grid: Grid, landmarks: int) -> Tensor:
    """The way back, bilinearly: ``(B, h, E + landmarks**2, e)`` to ``(B, h, N, e)``."""
    extra = x.shape[2] - landmarks**2
    rows, columns = (_weights(_interpolation, x, side, landmarks) for side in grid)
    maps = merge_heads(x[:, :, extra:]).unflatten(1, (landmarks, landmarks))
    maps = _each(rows, _each(columns, maps).flatten(2))  # (B, H, W * C)
    channels = x.shape[1] * x.shape[3]
    tokens = maps.unflatten(2, (grid[1], channels)).flatten(1, 2)  # (B, H * W, C)
    if extra:
        tokens = torch.cat([merge_heads(x[:, :, :extra]), tokens], dim=1)
    return split_heads(tokens, x.shape[1])


def _each(matrix: Tensor, x: Tensor) -> Tensor:
    """The product with each matrix, spelt out for what counts operations."""
    return matrix.expand(*x.shape[:-2], -1, -1) @ x


def _weights(kind: Callable[..., Tensor], like: Tensor, *sizes: int) -> Tensor:
    """One of the matrices below; made once, unless something looks at operations."""
    if is_tracing_or_needs_grad() or any(type(size) is not int for size in sizes):
        return kind(*sizes, dtype=like.dtype, device=like.device)
    return _made_once(kind, *sizes, dtype=like.dtype, device=like.device)


@functools.lru_cache(maxsize=256)
def _made_once(kind: Callable[..., Tensor], *sizes: int, **options: Any) -> Tensor:
    with torch.inference_mode(False):  # or nothing could be trained with it later
        return kind(*sizes, **options)


def _pooling(side: int, landmarks: int, *, dtype: Any, device: Any) -> Tensor:
    """``(landmarks, side)``, whose rows are means over what a region touches."""
    place = torch.arange(side, device=device)
    region = torch.arange(landmarks, device=device)[:, None]
    begins, ends = region * side, (region + 1) * side
    touches = ((place + 1) * landmarks > begins) & (place * landmarks < ends)
    weights = touches.to(dtype)
    return weights / weights.sum(1, keepdim=True)


def _blocks(landmarks: int, *, dtype: Any, device: Any) -> Tensor:
    """Means over blocks of 2x2 regions, ``(ceil(landmarks / 2)**2, landmarks**2)``."""
    sides = _pooling(landmarks, -(-landmarks // 2), dtype=dtype, device=device)
    return torch.kron(sides, sides)


def _interpolation(side: int, landmarks: int, *, dtype: Any, device: Any) -> Tensor:
    """``(side, landmarks)``, linear between the centres of regions, constant beyond."""
    place = torch.arange(side, device=device, dtype=dtype)[:, None]
    region = torch.arange(landmarks, device=device, dtype=dtype)
    at = (place + 0.5) * landmarks / side - 0.5
    distance = (at.clamp(0, landmarks - 1) - region).abs()
    return (1 - distance).clamp_min(0)
