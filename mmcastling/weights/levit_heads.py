"""LeViT's attention projections, refitted to the heads of castled attention.

The published attention has queries and keys of ``d`` channels a head and values of
``e = 2 d`` or ``4 d``; the castled one has one width for all three, and as many heads
as fill the block's channels. The refit keeps the function: linear-angular attention,
and the softmax branch without biases, are at first what they would be with the
published projections. Only where castled attention has fewer heads something is lost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmcastling.errors import CheckpointError
from mmcastling.weights.source import Weights

SCALES = ("bn.weight", "bn.bias")
ROWS = ("linear.weight", *SCALES, "bn.running_mean", "bn.running_var")
"""What a linear layer and its batch norm hold per output channel."""


class Heads(NamedTuple):
    """How many heads an attention has, and each one's channels of keys and values."""

    count: int
    keys: int
    values: int


def heads_of(weights: Weights, block: str) -> Heads:
    """The published heads of an attention, as its shapes show them."""
    count = weights[f"{block}.attention_biases"].shape[0]
    within = f"{block}.qkv.linear.weight" in weights  # a stage, not between two
    layer = "qkv" if within else "q.1"
    names = [f"{block}.{part}.linear.weight" for part in ("proj.1", layer)]
    proj, rows = _all_of(weights, names)
    values, keys = proj.shape[1] // count, rows.shape[0] // count
    return Heads(count, (keys - values) // 2 if within else keys, values)


def refit_attention(
    weights: Weights, block: str, heads: Heads, to: Heads, noise: float
) -> dict[str, str]:
    """Replace an attention's published projections by castled ones, in place.

    ``block`` is its name among ours, ``to`` has as many keys as values, and ``noise``
    is that of :func:`repeat_keys`. Returns what was done, by name of the weights.
    """
    generator = torch.Generator().manual_seed(0)
    proj = f"{block}.proj.1.linear.weight"
    columns = weights[proj].unflatten(1, (heads.count, -1))
    # The weightiest heads of too many, or all and then the first again.
    kept = torch.arange(to.count) % heads.count
    if to.count < heads.count:
        weightiest = columns.norm(dim=(0, 2)).topk(to.count).indices
        kept = weightiest.sort().values
    values = torch.arange(to.values) % heads.values
    # Between stages queries are fewer than keys and values.
    layers = ("qkv",) if f"{block}.qkv.linear.weight" in weights else ("q.1", "kv")
    for part in ROWS:
        parts = _all_of(weights, [f"{block}.{layer}.{part}" for layer in layers])
        rows = torch.cat([p.unflatten(0, (heads.count, -1)) for p in parts], dim=1)
        widths = [heads.keys, heads.keys, heads.values]
        q, k, v = rows[kept].split(widths, dim=1)
        q = repeat_keys(q, to.keys, part, noise, generator)
        k = repeat_keys(k, to.keys, part, noise, generator)
        v = v[:, values]
        if part in SCALES:
            v[:, heads.values :] = 0.0  # added values have no effect at first
            # The branch divides logits by the root of the width.
            q = q * (to.keys / heads.keys) ** 0.5
        weights[f"{block}.qkv.{part}"] = torch.cat([q, k, v]).flatten(0, 1)
    counter = f"{block}.{layers[0]}.bn.num_batches_tracked"
    if counter in weights:
        weights[f"{block}.qkv.bn.num_batches_tracked"] = weights[counter]
    for name in [n for n in weights if n.startswith((f"{block}.q.", f"{block}.kv."))]:
        del weights[name]

    note = "q and k repeated to the width of castled heads"
    if noise:
        note += f" (noise {noise:g})"
    if to.count < heads.count:
        note += f", {heads.count - to.count} of {heads.count} heads left out"
    changed = {f"{block}.qkv.{part}": note for part in ROWS}
    if (to.count, to.values) != (heads.count, heads.values):
        columns = columns[:, kept]
        columns[:, heads.count :] = 0.0  # nor have repeated heads
        weights[proj] = columns[..., values].flatten(1)
        changed[proj] = "columns for the castled heads"
    return changed


def repeat_keys(
    rows: Tensor, width: int, part: str, noise: float, generator: torch.Generator
) -> Tensor:
    """Repeat queries or keys ``(heads, d, ...)`` to ``(heads, width, ...)``.

    A channel with ``m`` copies is scaled by ``1 / sqrt(m)`` through its batch norm, so
    that products and lengths stay what they are. Copies that are equal would receive
    equal gradients for ever; a little noise on the later ones lets them part (as
    Net2Net does, Chen et al. 2016). ``part`` is the one of :data:`ROWS` that is meant,
    and ``noise`` a standard deviation relative to that of the weights.
    """
    channels = rows.shape[1]
    index = torch.arange(width) % channels
    repeated = rows[:, index]
    if part in SCALES:
        copies = torch.bincount(index, minlength=channels)[index]
        return repeated / copies.to(rows.dtype).sqrt()
    if part == "linear.weight" and noise:
        jitter = torch.randn(repeated.shape, generator=generator, dtype=rows.dtype)
        jitter[:, :channels] = 0.0
        repeated = repeated + noise * rows.std() * jitter
    return repeated


def _all_of(weights: Weights, names: list[str]) -> list[Tensor]:
    if missing := [name for name in names if name not in weights]:
        raise CheckpointError(f"the weights are not complete: no {', '.join(missing)}")
    return [weights[name] for name in names]
