"""LeViT's attention projections, refitted to the heads of castled attention.

The published attention has queries and keys of ``d`` channels a head and values of
``e = 2 d`` or ``4 d``; the castled one has one width for all three, and as many heads
as fill the block's channels. The refit keeps the function: linear-angular attention,
and the softmax branch without biases, are at first what they would be with the
published projections. Only where castled attention has fewer heads something is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcastling.checkpoint import CheckpointError
from mmcastling.weights.source import Container

# What a linear layer and its batch norm hold per output channel.
ROWS = (
    "linear.weight",
    "bn.weight",
    "bn.bias",
    "bn.running_mean",
    "bn.running_var",
)
_SCALES = ("bn.weight", "bn.bias")
_COUNTER = "bn.num_batches_tracked"


@dataclass(frozen=True)
class Heads:
    """The heads of one attention.

    Args:
        count: How many there are.
        keys: Channels of queries and keys in each.
        values: Channels of values in each.
    """

    count: int
    keys: int
    values: int


def refit_attention(
    weights: Container, block: str, heads: Heads, to: Heads, noise: float
) -> dict[str, str]:
    """Replace an attention's published projections by castled ones, in place.

    Args:
        weights: Weights under our names.
        block: Name of the attention.
        heads: Its published heads.
        to: Its castled heads, with as many keys as values.
        noise: See :func:`repeat_keys`.

    Returns:
        What was done, by name of the weights that were changed.

    Raises:
        CheckpointError: If one of the projections' weights is missing.
    """
    generator = torch.Generator().manual_seed(0)
    columns = weights[f"{block}.proj.1.linear.weight"].unflatten(1, (heads.count, -1))
    kept = _heads_to_keep(columns, to.count)
    layers = ("qkv",)
    if f"{block}.qkv.linear.weight" not in weights:
        layers = ("q.1", "kv")  # queries are fewer than keys and values
    for part in ROWS:
        names = [f"{block}.{layer}.{part}" for layer in layers]
        q, k, v = (rows[kept] for rows in _take_rows(weights, names, heads))
        q = repeat_keys(q, to.keys, part, noise, generator)
        k = repeat_keys(k, to.keys, part, noise, generator)
        if part in _SCALES:  # the branch divides logits by the root of the width
            q = q * (to.keys / heads.keys) ** 0.5
        joined = torch.cat([q, k, _widen_values(v, to.values, part)])
        weights[f"{block}.qkv.{part}"] = joined.flatten(0, 1)
    _keep_counter(weights, block, layers)

    note = "q and k repeated to the width of castled heads"
    if noise:
        note += f" (noise {noise:g})"
    if to.count < heads.count:
        note += f", {heads.count - to.count} of {heads.count} heads left out"
    changed = {f"{block}.qkv.{part}": note for part in ROWS}
    if to.count != heads.count or to.values != heads.values:
        columns = columns[:, kept]
        columns[:, heads.count :] = 0.0  # repeated heads have no effect at first
        widened = columns[..., torch.arange(to.values) % heads.values]
        name = f"{block}.proj.1.linear.weight"
        weights[name] = widened.flatten(1)
        changed[name] = "columns for the castled heads"
    return changed


def _take_rows(
    weights: Container, names: list[str], heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove q, k and v from the weights, each ``(heads, channels, ...)``."""
    if missing := [name for name in names if name not in weights]:
        raise CheckpointError(f"the weights are not complete: no {', '.join(missing)}")
    parts = [weights.pop(name).unflatten(0, (heads.count, -1)) for name in names]
    widths = [heads.keys, heads.keys, heads.values]
    q, k, v = torch.cat(parts, dim=1).split(widths, dim=1)
    return q, k, v


def _keep_counter(weights: Container, block: str, layers: tuple[str, ...]) -> None:
    counters = [weights.pop(f"{block}.{name}.{_COUNTER}", None) for name in layers]
    if counters[0] is not None:
        weights[f"{block}.qkv.{_COUNTER}"] = counters[0]


def _heads_to_keep(columns: Tensor, count: int) -> Tensor:
    """Heads by index: the weightiest of too many, or all and then the first again."""
    have = columns.shape[1]
    if count < have:
        weight = columns.norm(dim=(0, 2))  # of each head in the output projection
        return weight.topk(count).indices.sort().values
    return torch.arange(count) % have


def repeat_keys(
    rows: Tensor, width: int, part: str, noise: float, generator: torch.Generator
) -> Tensor:
    """Repeat the channels of queries or keys up to a width, scalar products unchanged.

    A channel with ``m`` copies is scaled by ``1 / sqrt(m)`` through its batch norm, so
    that products and lengths stay what they are. Copies that are equal would receive
    equal gradients for ever; a little noise on the later ones lets them part (as
    Net2Net does, Chen et al. 2016).

    Args:
        rows: ``(heads, d, ...)``: one of :data:`ROWS`, per output channel.
        width: Channels that are wanted.
        part: Which of :data:`ROWS` it is.
        noise: Standard deviation of the noise on weights, relative to theirs.
        generator: Source of the noise.

    Returns:
        ``(heads, width, ...)``.
    """
    channels = rows.shape[1]
    index = torch.arange(width) % channels
    repeated = rows[:, index]
    if part in _SCALES:
        copies = torch.bincount(index, minlength=channels)[index]
        return repeated / copies.to(rows.dtype).sqrt()
    if part == "linear.weight" and noise:
        jitter = torch.randn(repeated.shape, generator=generator, dtype=rows.dtype)
        jitter[:, :channels] = 0.0
        repeated = repeated + noise * rows.std() * jitter
    return repeated


def _widen_values(rows: Tensor, width: int, part: str) -> Tensor:
    """Repeat the channels of values; the added ones are zero behind the batch norm."""
    channels = rows.shape[1]
    repeated = rows[:, torch.arange(width) % channels]
    if part in _SCALES:
        repeated[:, channels:] = 0.0
    return repeated
