"""Where a token looks: rows of the attention matrices inside a castled model.

Linear attention never forms its matrix, so it is formed here for one query, from the q
and k that a forward pass has computed. The auxiliary branch has no parameters, so its
rows can be shown for a deployed model too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention import LinearAngularMixer, MaskThreshold, unit_rows

Grid = tuple[int, int]
OFF = MaskThreshold(1.0)


@dataclass(frozen=True)
class MixerCall:
    """What one attention was given in a forward pass of one image.

    Attributes:
        name: The attention's path in the model.
        mixer: The attention itself.
        q: Queries ``(h, N, d)``.
        k: Keys ``(h, N, d)``.
        v: Values ``(h, N, e)``.
        grid: ``(H, W)``, which the last ``H * W`` of the ``N`` tokens fill row by row.
    """

    name: str
    mixer: LinearAngularMixer
    q: Tensor
    k: Tensor
    v: Tensor
    grid: Grid

    @property
    def extra_tokens(self) -> int:
        """Tokens before the grid, such as a class token."""
        return self.q.shape[1] - math.prod(self.grid)

    def token_at(self, x: float, y: float) -> int:
        """Index of the token at fractions in [0, 1) of the grid's width and height."""
        height, width = self.grid
        row = min(int(y * height), height - 1)
        return self.extra_tokens + row * width + min(int(x * width), width - 1)


@dataclass(frozen=True)
class AttentionRows:
    """The weights of one query ``i`` on all ``N`` tokens ``j``, each ``(h, N)``.

    Attributes:
        softmax: ``P_ij``, the row of ``softmax(q k^T / sqrt(d))``. Sums to 1.
        angular: What the deployed model computes without ever forming it,
            ``1/2 [i = j] + (1/pi) s <q^_i, k^_j>``, where ``q^`` and ``k^`` have length
            1 and ``s`` is 1, or ``reference_tokens / N`` where that is set. These are
            the linear terms of the angular kernel, its constant on the token itself
            (see :func:`mmcastling.attention.linear_angular_attention`). May be
            negative.
        masked: The auxiliary branch, ``weight * P_ij`` where ``P_ij > threshold`` and
            zero elsewhere, not renormalized.
        combined: ``masked + angular``: times the values it is what the attention
            yields before normalization and local convolution.
    """

    softmax: Tensor
    angular: Tensor
    masked: Tensor
    combined: Tensor

    def reduce_heads(self, head: int | None) -> AttentionRows:
        """One head's rows ``(N,)``, or with None the mean over heads.

        Raises:
            ValueError: If there is no such head.
        """
        heads = self.softmax.shape[0]
        if head is not None and not 0 <= head < heads:
            raise ValueError(
                f"head {head} does not exist: this attention has heads 0 to {heads - 1}"
            )

        def reduce(rows: Tensor) -> Tensor:
            return rows.mean(dim=0) if head is None else rows[head]

        return AttentionRows(*(reduce(rows) for rows in vars(self).values()))


@torch.no_grad()
def attention_rows(
    q: Tensor,
    k: Tensor,
    query: int,
    *,
    threshold: float | str | MaskThreshold = OFF,
    weight: float = 1.0,
    reference_tokens: int | None = None,
) -> AttentionRows:
    """The attention of one query, in the four forms of :class:`AttentionRows`.

    Args:
        q: Queries ``(h, N, d)``.
        k: Keys ``(h, N, d)``.
        query: Index of the query among the ``N`` tokens.
        threshold: As in ``set_mask``. Defaults to 1, with the branch off.
        weight: As there. Defaults to 1.
        reference_tokens: As in :class:`mmcastling.attention.LinearAngularMixer`.
            Defaults to None.

    Raises:
        ValueError: If the threshold cannot be read.
    """
    threshold = MaskThreshold.parse(threshold)
    q, k = q.float()[:, query : query + 1], k.float()  # (h, 1, d), (h, N, d)
    tokens = k.shape[1]
    softmax = torch.softmax(q @ k.transpose(1, 2) * k.shape[2] ** -0.5, dim=-1)
    scale = 1.0 if reference_tokens is None else reference_tokens / tokens
    angular = unit_rows(q) @ unit_rows(k).transpose(1, 2) * (scale / math.pi)
    softmax, angular = softmax.squeeze(1), angular.squeeze(1)  # (h, N)
    angular[:, query] += 0.5
    survives = (softmax > threshold.resolve(tokens)) & (not threshold.rejects_all)
    masked = torch.where(survives, weight * softmax, 0.0)
    return AttentionRows(softmax, angular, masked, masked + angular)


def mask_of(mixer: LinearAngularMixer) -> tuple[MaskThreshold, float]:
    """Threshold and weight in force; those of a branch that is off once pruned."""
    if hasattr(mixer, "mask_threshold"):
        return mixer.mask_threshold, mixer.mask_weight
    return OFF, 1.0


def angular_layers(model: nn.Module) -> list[tuple[str, LinearAngularMixer]]:
    """``(name, mixer)`` of the backbone's linear-angular attentions, in its order.

    Castled ones count whether they are deployed or not.

    Args:
        model: A backbone, classifier, detector or segmentor.
    """
    prefix = "backbone." if hasattr(model, "backbone") else ""
    return [
        (f"{prefix}{name}", module)
        for name, module in getattr(model, "backbone", model).named_modules()
        if isinstance(module, LinearAngularMixer)
    ]


@torch.no_grad()
def record_attention(model: nn.Module, image: Tensor, layer: int = -1) -> MixerCall:
    """Run a model's feature extractor and keep what one attention was given.

    Args:
        model: A backbone, classifier, detector or segmentor, in evaluation mode.
        image: One preprocessed image ``(1, 3, H, W)``.
        layer: Which attention, in order of depth, negative from the end. Defaults to
            -1.

    Raises:
        ValueError: If the model has no such attention, or one whose tokens cannot be
            laid out on the image: windows, or a grid that it was not told.
    """
    layers = angular_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no castling attention in its backbone: use a "
            "config whose backbone has attention=dict(type='castling'), or castle the "
            "model first"
        )
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"layer {layer} does not exist: the backbone has {len(layers)} castling "
            f"attentions, 0 to {len(layers) - 1}, or -1 to {-len(layers)} from the end"
        )
    name, mixer = layers[layer]
    with _recording(mixer) as calls:
        getattr(model, "extract_feat", model)(image)
    if len(calls) != 1 or calls[0][0].shape[0] != 1:
        raise ValueError(
            f"{name} does not attend over the whole image at once but in "
            f"{sum(q.shape[0] for q, *_ in calls)} parts (windows): its maps cannot be "
            "laid over the image. Choose a backbone with global attention"
        )
    q, k, v, grid = calls[0]
    if grid is None:
        raise ValueError(
            f"{name} was not told the grid of its {q.shape[2]} tokens: give a square "
            "image, or castle the model with grid=(H, W)"
        )
    return MixerCall(name, mixer, q[0], k[0], v[0], tuple(map(int, grid)))


@contextmanager
def _recording(
    mixer: LinearAngularMixer,
) -> Iterator[list[tuple[Tensor, Tensor, Tensor, Grid | None]]]:
    """Collect q, k, v and grid of every call of a mixer.

    A block projects inside its ``forward``, so a hook on that sees tokens and grid;
    queries, keys and values meet in ``mix``, or in ``mix_to_unit``, which may call it.
    """
    calls: list[tuple[Tensor, Tensor, Tensor, Grid | None]] = []
    grid: Grid | None = None
    depth = 0
    signature = inspect.signature(mixer.forward)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal grid
        grid = signature.bind(*args, **kwargs).arguments.get("grid")

    def recorded(function: Any) -> Any:
        def wrapped(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if not depth:
                calls.append((q, k, v, grid))
            depth += 1
            try:
                return function(q, k, v, *args, **kwargs)
            finally:
                depth -= 1

        return wrapped

    handle = mixer.register_forward_pre_hook(before, with_kwargs=True)
    mixer.mix = recorded(mixer.mix)
    mixer.mix_to_unit = recorded(mixer.mix_to_unit)
    try:
        yield calls
    finally:
        del mixer.mix, mixer.mix_to_unit
        handle.remove()
