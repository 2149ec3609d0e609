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
from mmcastling.attention.functional import mean_of_tokens
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
    gives it, and one near it nearly so. Far from it, where logits are peaked and
    queries of a region differ, a line has no bounds as softmax has.

    Along a side of the grid that has fewer tokens than landmarks each token is one, so
    that a grid of at most ``landmarks x landmarks`` tokens has softmax attention, at
    its cost.

    Args:
        q: Queries ``(B, h, N, d)``, of which the last ``H * W`` fill the grid row by
            row.
        k: Keys ``(B, h, N, d)``.
        v: Values ``(B, h, N, e)``.
        grid: ``(H, W)`` of the tokens.
        landmarks: Regions along each side of the grid.
        balance: The factors ``own``, ``even`` and ``gain``, each ``(h,)``. Defaults to
            None (0, 1 and 1).
        sharpness: Of the landmarks' attention alone, ``(h,)``. Defaults to None (1).

    Returns:
        ``(B, h, N, e)``; float32 for half-precision inputs.

    Raises:
        ValueError: If ``grid`` is missing or holds more than ``N`` tokens.
    """
    mean, keys_values = landmark_terms(
        *(q, k, v),
        grid=grid,
        landmarks=landmarks,
        balance=balance,
        sharpness=sharpness,
    )
    own = 0.0 if balance is None else balance[0].to(mean)[:, None, None]
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
        ``even (a v)~ - p~ C'``, ``(B, h, N, e)``, and ``C' = gain C / sqrt(d)``,
        ``(B, h, d, e)``: the one is what ``q_i C'`` is added to.
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
        all_are = _all_are_landmarks(grid, landmarks)
        queries = _itself(q) if all_are else pool(q, grid=grid, landmarks=landmarks)
        sharp = scale * queries
        if sharpness is not None:
            sharp = sharp * sharpness.to(sharp)[:, None, None]
        logits = _product(sharp, k.transpose(2, 3))
        attention = torch.softmax(logits, dim=3)
        even, gain = 1.0, 1.0
        if balance is not None:
            even, gain = (factor.to(logits)[:, None, None] for factor in balance[1:])
        if all_are:  # none is apart from its landmark
            nothing = logits.new_zeros(*v.shape[:2], k.shape[3], v.shape[3])
            return even * _product(attention, v), gain * nothing
        center = mean_of_tokens(parts(k, 2)[0])  # any that is near
        some = zip(parts(k, 2), parts(v, 2), parts(attention, 3), strict=True)
        sums = [_sums(*part, center, extra=extra, landmarks=landmarks) for part in some]
        values, keys, products = (
            functools.reduce(torch.add, terms) for terms in zip(*sums, strict=True)
        )
        # The mean over blocks of E[k v] - E[k] E[v].
        of_blocks = _each(_weights(_blocks, values, landmarks), values[:, :, extra:])
        apart = keys.transpose(2, 3) @ of_blocks / of_blocks.shape[2]
        keys_values = gain * scale * (products - apart)
        at_landmarks = even * values - queries @ keys_values
        return interpolate(at_landmarks, grid=grid, landmarks=landmarks), keys_values


def _all_are_landmarks(grid: Grid, landmarks: int) -> bool:
    """Whether every token is known to be one; a graph for all grids takes them all."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(type(side) is int and side <= landmarks for side in grid)


@in_full_precision
def _itself(x: Tensor) -> Tensor:
    return x


@in_full_precision
def _product(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


@in_full_precision
def _sums(
    k: Tensor,
    v: Tensor,
    attention: Tensor,
    center: Tensor,
    *,
    extra: int,
    landmarks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over keys: ``a v`` of landmarks, ``a k`` and ``k^T v`` of blocks."""
    blocks = _each(_weights(_blocks, attention, landmarks), attention[:, :, extra:])
    shares = blocks.mean(2).unsqueeze(3)  # (B, h, n, 1)
    k = k - center  # products of what all keys have in common would be rounded
    return attention @ v, blocks @ k, (shares * k).transpose(2, 3) @ v


@in_full_precision
def pool(x: Tensor, *, grid: Grid, landmarks: int) -> Tensor:
    """Means over the regions of a grid, as of torch's adaptive average pooling.

    Where a side has fewer tokens than landmarks, some of these are the same token.

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
    count, cell = _cells(side, landmarks, device)
    begins, ends = cell * side, (cell + 1) * side
    touches = ((place + 1) * count > begins[:, None]) & (place * count < ends[:, None])
    weights = touches.to(dtype)
    return weights / weights.sum(1, keepdim=True)


def _cells(side: int, landmarks: int, device: Any) -> tuple[Any, Tensor]:
    """How many cells a side is cut into, and that of each landmark.

    As many as landmarks, or as tokens where these are fewer; then some landmarks are
    the same.
    """
    if isinstance(side, Tensor):  # traced
        count = side.clamp(max=landmarks)
    else:
        count = torch.sym_min(side, landmarks)
    return count, torch.arange(landmarks, device=device) * count // landmarks


def _blocks(landmarks: int, *, dtype: Any, device: Any) -> Tensor:
    """Means over blocks of 2x2 regions, ``(ceil(landmarks / 2)**2, landmarks**2)``."""
    sides = _pooling(landmarks, -(-landmarks // 2), dtype=dtype, device=device)
    return torch.kron(sides, sides)


def _interpolation(side: int, landmarks: int, *, dtype: Any, device: Any) -> Tensor:
    """``(side, landmarks)``, linear between the centres of regions, constant beyond."""
    place = torch.arange(side, device=device, dtype=dtype)[:, None]
    count, cell = _cells(side, landmarks, device)
    near = (1 - ((place + 0.5) * count / side - 0.5 - cell).abs()).clamp_min(0)
    return near / near.sum(1, keepdim=True)
