"""The auxiliary branch in memory that grows with N, not with N^2, exact both ways.

Probabilities are computed tile by tile (some rows of queries against all keys), used
and forgotten; the backward pass computes them again, for the rows that have a survivor
and for no others. With the mask ``M`` a constant, ``o_i = sum_{j in M_i} P_ij v_j``,
upstream gradients ``g`` and ``dP_ij = g_i . v_j`` for ``j in M_i`` (else 0)::

    dS_ij = P_ij (dP_ij - sum_l P_il dP_il),    S = q k^T / sqrt(d) + bias

A row without survivors has ``dP_i = 0``: it gives and receives no gradient. As the
masks empty, the backward pass empties with them and only the forward scores remain.

Everything runs inside a custom operator, which ``torch.compile`` and activation
checkpointing treat as one opaque step. The mask's values reach it as a tensor, so
that a schedule may change them at every iteration without a recompilation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from mmcastling.attention.autocast import in_full_precision
from mmcastling.attention.functional import naive_masked_softmax_attention
from mmcastling.attention.recording import is_transformed, register_flops
from mmcastling.attention.threshold import MaskThreshold
from mmcastling.errors import UnavailableError

# Probabilities per tile. On a CPU a tile's few matrices stay in the last-level cache;
# on an accelerator it keeps the device busy.
_TILE_CPU = 2**19
_TILE_DEVICE = 2**25
# Fewer rows than this make poor matrix products, however many keys there are.
_MIN_ROWS = 64


def mask_state(
    threshold: float | str | MaskThreshold, weight: float = 1.0, penalty: float = 0.0
) -> Tensor:
    """The arguments of :func:`masked_softmax_attention` as four float64 on the CPU."""
    threshold = MaskThreshold.parse(threshold)
    values = (threshold.probability, threshold.multiple, weight, penalty)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def masked_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | str | MaskThreshold = 0.02,
    weight: float = 1.0,
    penalty: float = 0.0,
    return_density: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The auxiliary branch ``weight * ([P > threshold] * P) v`` (paper, section 3.3).

    ``P = softmax(q k^T / sqrt(d))`` of the un-normalised queries and keys. The mask is
    a constant to the gradient and the rows are not renormalised. Equal to
    :func:`naive_masked_softmax_attention`, without its ``N x M`` matrices. Not
    differentiable twice. Queries are ``(B, h, N, d)``, keys ``(B, h, M, d)``, values
    ``(B, h, M, e)``.

    Args:
        bias: Added to the logits, such as one of relative positions; it broadcasts to
            ``(B, h, N, M)`` and has a gradient. Defaults to None.
        threshold: A probability, or a multiple of uniform attention such as ``'4/N'``.
            Defaults to 0.02, the released value.
        weight: Factor of the branch. Defaults to 1.
        penalty: Add the gradient of ``penalty * sum([P > threshold] * P)``, over all
            images, heads and pairs, to those of ``q`` and ``k`` in the backward pass.
            It acts as that term in the loss would, without touching the loss (and is
            therefore not multiplied by a loss scale). Defaults to 0.
        return_density: Also return the fraction of pairs that survive, as a tensor
            without a synchronisation. Defaults to False.

    Forward-mode differentiation and ``torch.func`` are served by plain operations,
    which keep ``N x M`` matrices and have no penalty.

    Returns:
        ``(B, h, N, e)``; float32 for half-precision inputs. With ``return_density`` a
        pair of that and a scalar tensor.
    """
    out, density = masked_softmax_with_state(
        q, k, v, bias, state=mask_state(threshold, weight, penalty)
    )
    return (out, density) if return_density else out


@in_full_precision
def masked_softmax_with_state(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`masked_softmax_attention`, and its density, by :func:`mask_state`."""
    if is_transformed():  # of which the operator knows nothing
        return _plain_operations(q, k, v, bias, state)
    out, _, density = _masked_softmax(q, k, v, bias, state)
    return out, density


def _plain_operations(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    probability, multiple, weight, penalty = state.tolist()
    if penalty:
        raise UnavailableError(
            f"the penalty of the masks ({penalty:g}) acts in backward passes alone: "
            "set it to 0 under forward-mode differentiation and torch.func"
        )
    threshold = MaskThreshold(probability, multiple)
    return naive_masked_softmax_attention(
        q, k, v, bias, threshold=threshold, weight=weight, return_density=True
    )


# -- the operator ----------------------------------------------------------------------


def _read_state(state: Tensor, keys: int) -> tuple[float, float, float]:
    probability, multiple, weight, penalty = state.tolist()
    return MaskThreshold(probability, multiple).resolve(keys), weight, penalty


@library.custom_op(
    "mmcastling::masked_softmax",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor state)"
    " -> (Tensor, Tensor, Tensor)",
)
@in_full_precision  # autocast reaches in, and may be on around a backward pass
def _masked_softmax(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The branch, the largest probability of each row ``(B, h, N)`` and the density."""
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    peak = q.new_zeros(q.shape[:-1])
    count = torch.zeros((), dtype=torch.int64, device=q.device)
    pairs = peak.numel() * k.shape[-2]
    if pairs:
        threshold, weight, _ = _read_state(state, k.shape[-2])
        tiles = _Tiles(q, k, v, bias)
        flat_out, flat_peak = out.flatten(0, 1), peak.flatten(0, 1)
        for heads, rows in tiles.all():
            p = tiles.probabilities(heads, rows)
            torch.amax(p, dim=-1, out=flat_peak[heads, rows])
            # Whether a tile has survivors is free to ask on a CPU; elsewhere the answer
            # would have to be waited for.
            if q.is_cpu and not (flat_peak[heads, rows] > threshold).any():
                continue
            survivors = tiles.survivors(p, threshold)
            count += tiles.number_of(survivors)
            torch.bmm(survivors, tiles.v[heads], out=flat_out[heads, rows])
        out.mul_(weight)
    return out, peak, count.to(torch.float32) / max(pairs, 1)


@_masked_softmax.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(q.shape[:-1]),
        q.new_empty((), dtype=torch.float32),
    )


@library.custom_op(
    "mmcastling::masked_softmax_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor peak, "
    "Tensor state) -> (Tensor, Tensor, Tensor, Tensor)",
)
@in_full_precision
def _masked_softmax_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    peak: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and bias (an empty one without)."""
    grads = tuple(t.new_zeros(t.shape) for t in (q, k, v))
    grads += (q.new_zeros(0) if bias is None else q.new_zeros(bias.shape),)
    if not peak.numel() or not k.shape[-2]:
        return grads
    threshold, weight, penalty = _read_state(state, k.shape[-2])
    dq, dk, dv = (t.flatten(0, 1) for t in grads[:3])
    tiles = _Tiles(q, k, v, bias)
    dbias = None if bias is None else tiles.as_matrices(grads[3])
    grad = grad.flatten(0, 1)
    for heads, rows in tiles.with_survivors(peak.flatten(0, 1) > threshold):
        q_rows, grad_rows = tiles.q[heads, rows], grad[heads, rows] * weight
        p = tiles.probabilities(heads, rows)
        survivors = tiles.survivors(p, threshold)
        dv[heads].baddbmm_(survivors.transpose(1, 2), grad_rows)
        ds = tiles.product(grad_rows, tiles.v[heads])
        if penalty:
            ds += penalty
        ds *= survivors
        ds.addcmul_(p, ds.sum(dim=-1, keepdim=True), value=-1.0)
        dq[heads, rows] = ds @ tiles.k[heads]
        dk[heads].baddbmm_(ds.transpose(1, 2), q_rows)
        if dbias is not None:
            tiles.add_to_bias(dbias, heads, rows, ds)
    dq *= q.shape[-1] ** -0.5
    return grads


@_masked_softmax_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    peak: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(0 if bias is None else bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    q, k, v, bias, state = inputs
    _, peak, density = output
    ctx.save_for_backward(q, k, v, bias, peak, state)
    ctx.mark_non_differentiable(peak, density)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, bias, peak, state = ctx.saved_tensors  # once: a checkpoint computes them
    *grads, dbias = _masked_softmax_backward(grad, q, k, v, bias, peak, state)
    return (*grads, None if bias is None else dbias, None)


_masked_softmax.register_autograd(_backward, setup_context=_save_for_backward)


def _flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


# As of fused attention, all products count as dense, whatever the masks let through.
register_flops(torch.ops.mmcastling.masked_softmax, _flops)
register_flops(torch.ops.mmcastling.masked_softmax_backward, _backward_flops)


class _Tiles:
    """Some rows of queries against all keys at a time, in memory that is reused.

    Small attentions are taken several heads at a time, large ones by rows of one head.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
    ) -> None:
        # (B h, N, d) divided by sqrt(d), (B h, M, d) and (B h, M, e)
        self.q = q.flatten(0, 1) * q.shape[-1] ** -0.5
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self._num_heads, self._num_rows, _ = self.q.shape
        keys = k.shape[-2]
        size = _TILE_CPU if q.is_cpu else _TILE_DEVICE
        self._heads = min(self._num_heads, max(1, size // (self._num_rows * keys)))
        self._rows = self._num_rows
        if self._heads == 1:
            self._rows = min(self._num_rows, max(_MIN_ROWS, size // keys))
        self._memory = [q.new_empty(0) for _ in range(3)]
        self._bias = None if bias is None else self.as_matrices(bias)
        if bias is not None:
            # Of each image's heads, which matrix of the bias is theirs.
            count = torch.arange(self._bias.shape[0], device=q.device)
            count = count.view(*(1,) * (4 - bias.ndim), *bias.shape[:-2])
            self._matrix_of = count.expand(q.shape[:2]).flatten()

    def _matrix(self, slot: int, heads: int, rows: int) -> Tensor:
        shape = (heads, rows, self.k.shape[-2])
        size = math.prod(shape)
        if self._memory[slot].numel() < size:
            self._memory[slot] = self.q.new_empty(size)
        return self._memory[slot][:size].view(shape)

    def all(self) -> Iterator[tuple[slice, slice]]:
        """Yield the heads and the rows of every tile."""
        for head in range(0, self._num_heads, self._heads):
            heads = slice(head, min(head + self._heads, self._num_heads))
            for row in range(0, self._num_rows, self._rows):
                yield heads, slice(row, min(row + self._rows, self._num_rows))

    def with_survivors(self, active: Tensor) -> Iterator[tuple[slice, slice | Tensor]]:
        """Yield tiles that together cover the active rows ``(B h, N)``."""
        counts = active.sum(dim=1).tolist()  # synchronises, once
        if self._heads > 1:
            for heads, rows in self.all():
                if any(counts[heads]):
                    yield heads, rows
            return
        first = active.argsort(dim=1, descending=True, stable=True)
        for head, count in enumerate(counts):
            for row in range(0, count, self._rows):
                rows = first[head, row : min(row + self._rows, count)]
                yield slice(head, head + 1), rows

    def as_matrices(self, bias: Tensor) -> Tensor:
        """A bias, or its gradient, with its leading axes as one."""
        return bias.reshape(-1, *bias.shape[-2:])

    def add_to_bias(
        self, dbias: Tensor, heads: slice, rows: slice | Tensor, ds: Tensor
    ) -> None:
        """Add a tile of the logits' gradient to that of the bias."""
        which = self._matrix_of[heads]
        if dbias.shape[-2] == 1:
            ds, rows = ds.sum(dim=1, keepdim=True), slice(None)
        if dbias.shape[-1] == 1:
            ds = ds.sum(dim=2, keepdim=True)
        if isinstance(rows, slice):
            dbias[:, rows].index_add_(0, which, ds)
        else:  # of one head
            dbias[int(which)].index_add_(0, rows, ds[0])

    def probabilities(self, heads: slice, rows: slice | Tensor) -> Tensor:
        """Softmax of queries against the keys; overwrites slots 0 and 1."""
        scores = self.product(self.q[heads, rows], self.k[heads])
        if self._bias is not None:
            full = self._bias.shape[-2] > 1
            scores += self._bias[self._matrix_of[heads]][
                :, rows if full else slice(None)
            ]
        return torch.softmax(scores, dim=-1, out=self._matrix(1, *scores.shape[:2]))

    def survivors(self, p: Tensor, threshold: float) -> Tensor:
        """Probabilities above the threshold, zero elsewhere; overwrites slot 2."""
        out = self._matrix(2, *p.shape[:2])
        return torch.ops.aten.threshold.out(p, threshold, 0.0, out=out)

    def number_of(self, survivors: Tensor) -> Tensor:
        """How many are not zero, 20 times as fast as torch's; overwrites slot 0."""
        ones = torch.sign(survivors, out=self._matrix(0, *survivors.shape[:2]))
        # Rows first: whole numbers up to 2^24 are exact in float32.
        return ones.sum(dim=-1).to(torch.int64).sum()

    def product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``rows columns^T`` for each head; overwrites slot 0."""
        out = self._matrix(0, *rows.shape[:2])
        return torch.bmm(rows, columns.transpose(1, 2), out=out)
