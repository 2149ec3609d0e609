"""Castling-ViT's attention as functions of tensors (paper, sections 3.2 and 3.3).

Shapes throughout: ``B`` images, ``h`` heads, ``N`` tokens, ``d`` and ``e`` channels per
head. Half-precision inputs are computed and returned in float32, because the linear
term grows with ``N`` beyond what float16 holds; the block normalises it afterwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.threshold import MaskThreshold
from mmcastling.errors import OptionError

# Rows shorter than this have no direction that float32 could tell: they count as zero.
NORM_EPS = 1e-12


@in_full_precision
def l2_normalize(
    x: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = NORM_EPS,
    least: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """L2-normalise the last axis; a zero row stays zero, with a zero gradient.

    Args:
        x: A tensor of any shape. Half precision is computed in float32.
        residual: Added to the result, in the same pass over memory. Defaults to None.
        eps: Rows up to this length become zero. Defaults to 1e-12.
        least: Lengths that broadcast to the rows': a shorter row is divided by that
            instead, and stays shorter than 1. Defaults to None.
        out: Where to write the result. Defaults to None (a new tensor).

    Returns:
        A tensor of the same shape whose rows have length 1 or 0, plus ``residual``.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if least is not None:
        length = torch.maximum(length, least)
    # A product, whose backward pass takes half as many passes over memory as a
    # quotient's. Rows that count as zero have an infinite length here.
    scale = torch.threshold(length, eps, math.inf).reciprocal()
    if residual is None:
        return torch.mul(x, scale, out=out)
    return torch.addcmul(residual.to(x.dtype), x, scale, out=out)


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

    ``(..., N, d)`` and ``(..., M, d)`` to ``(..., N, M)`` in [0, 1].
    """
    cosine = l2_normalize(q) @ l2_normalize(k).transpose(-2, -1)
    return 1.0 - torch.arccos(cosine.clamp(-1.0, 1.0)) / math.pi


def angular_similarity_series(q: Tensor, k: Tensor, order: int) -> Tensor:
    """The kernel's expansion up to the given order of its residual (paper, eq. 5).

    ``1/2 + c/pi + (1/pi) sum_{i=1}^{order} (2i)! / (4^i (i!)^2 (2i+1)) c^(2i+1)`` with
    ``c = <q^, k^>``. Order 0 leaves the linear terms, which is what inference keeps.
    ``(..., N, d)`` and ``(..., M, d)`` to ``(..., N, M)``.
    """
    c = l2_normalize(q) @ l2_normalize(k).transpose(-2, -1)
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
    block does; read literally it would weigh every token, ``1/2 sum_j v_j``. Queries
    and keys are ``(B, h, N, d)``, values ``(B, h, N, e)``.

    Args:
        literal_constant: Sum the constant over all tokens instead. Defaults to False.

    Returns:
        ``(B, h, N, e)``, not divided by the row sums of the kernel.
    """
    similarity = angular_similarity(q, k)
    if literal_constant:
        return similarity @ v
    return 0.5 * v + (similarity - 0.5) @ v


FORMS = ("released", "average")

LEAST_CENTERED = 2.0**-7
"""Of the length of the mean of keys, below which a centred key is not stretched to 1:
twice what bfloat16 rounds off at most."""


@in_full_precision
def linear_angular_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    form: str = "released",
    center_keys: bool = False,
    balance: tuple[Tensor, Tensor, Tensor] | None = None,
    reference_tokens: int | None = None,
) -> Tensor:
    """The linear terms of angular attention in O(N), in one of two forms.

    ``'released'``, that of the authors' block: ``1/2 v_i + (1/pi) q^_i (k^T^ v)``. The
    kernel's constant acts on the token itself, and the second term grows with ``N``.

    ``'average'``, the paper's formula divided by the sum ``N / 2`` of its row, with a
    gain of ``2 pi`` on what tells tokens apart:
    ``mean_j v_j + (4 / N) q^_i (k^T^ v)``. Nothing in it grows with ``N``.

    Args:
        q: Queries ``(B, h, N, d)``.
        k: Keys ``(B, h, N, d)``.
        v: Values ``(B, h, N, e)``.
        form: One of :data:`FORMS`. Defaults to ``'released'``.
        center_keys: Take the mean of all keys from each, which softmax attention would
            not notice. What is left counts less where it is shorter than
            :data:`LEAST_CENTERED` of the mean, as rounding leaves it. Defaults to
            False.
        balance: Factors ``(h,)`` of the token itself and of both terms of the average
            form, ``own v_i + even mean_j v_j + gain (4 / N) ...``. Defaults to None (0,
            1 and 1).
        reference_tokens: Scale the released form's second term by ``reference_tokens /
            N``. That term is a sum over the tokens while the first is not, so the
            balance learned at one resolution shifts at another; naming the number of
            tokens of training keeps it. Defaults to None (no scaling).

    Returns:
        ``(B, h, N, e)``; float32 for half-precision inputs.
    """
    if form not in FORMS:
        raise OptionError(f"form {form!r} is not known: choose one of {list(FORMS)}")
    keys_values = key_value_sum(k, v, center=mean_of_tokens(k) if center_keys else None)
    if form == "released":
        keys_values = keys_values * linear_factor(k, reference_tokens)
        return 0.5 * v + l2_normalize(q) @ keys_values
    average, keys_values = mean_of_tokens(v), 4 * keys_values / (v.shape[2] or 1)
    if balance is None:
        return average + l2_normalize(q) @ keys_values
    own, even, gain = (factor.to(v.dtype)[:, None, None] for factor in balance)
    return own * v + even * average + l2_normalize(q) @ (gain * keys_values)


def mean_of_tokens(x: Tensor) -> Tensor:
    """``(B, h, N, d)`` to ``(B, h, 1, d)``; float32 for half precision."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    total = x.sum(2, keepdim=True, dtype=torch.float32 if half else None)
    return total / (x.shape[2] or 1)


@in_full_precision
def key_value_sum(k: Tensor, v: Tensor, *, center: Tensor | None = None) -> Tensor:
    """``k^T^ v``, the sum over tokens of every head, ``(B, h, d, e)``."""
    return normalized_keys(k, center).transpose(-2, -1) @ v


def normalized_keys(k: Tensor, center: Tensor | None = None) -> Tensor:
    """``k^``, of a center that broadcasts to the keys what lies apart from it.

    What is shorter than :data:`LEAST_CENTERED` of the center stays shorter than 1.
    """
    if center is None:
        return l2_normalize(k)
    length = torch.linalg.vector_norm(center, dim=-1, keepdim=True)
    return l2_normalize(k - center, least=LEAST_CENTERED * length)


def linear_factor(k: Tensor, reference_tokens: int | None) -> float:
    """The factor of ``q^ (k^T^ v)`` in the released form."""
    if reference_tokens is None:
        return 1.0 / math.pi
    return reference_tokens / (math.pi * (k.shape[-2] or 1))


@in_full_precision
def naive_masked_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | str | MaskThreshold = 0.02,
    weight: float = 1.0,
    return_density: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The auxiliary branch as the paper writes it: the oracle for the bounded form.

    Keeps ``(B, h, N, M)`` matrices for the backward pass.
    Arguments and results as of :func:`masked_softmax_attention`.
    """
    threshold = MaskThreshold.parse(threshold)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    probability = torch.softmax(logits if bias is None else logits + bias, dim=-1)
    mask = probability > threshold.resolve(k.shape[-2])
    out = weight * (torch.where(mask, probability, 0.0) @ v)
    if return_density:
        return out, mask.mean(dtype=torch.float32)
    return out
