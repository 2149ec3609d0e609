"""What castling each attention alone costs, and what it saves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.alignment.pairs import (
    Features,
    attention_pairs,
    default_features,
    features_of,
    mean_cosines,
)
from mmcastling.analysis import paired_medians
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy


@dataclass(frozen=True)
class ScanRow:
    """One attention, castled alone.

    Attributes:
        name: In the model.
        damage: 1 minus the mean cosine of the features with the original's, of the
            level that changes most.
        softmax_ms, castled_ms: Median time of the attention before and after.
    """

    name: str
    damage: float
    softmax_ms: float
    castled_ms: float

    @property
    def saved_ms(self) -> float:
        return self.softmax_ms - self.castled_ms


@torch.no_grad()
def scan(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    features: Features = default_features,
    rounds: int = 5,
) -> list[ScanRow]:
    """Castle each attention alone, and see what that does to features and to time.

    Args:
        student: The castled network, aligned or not; it is not changed. Its attentions
            take the place of the teacher's one by one, deployed.
        teacher: The softmax network.
        batches: Batches of images ``(B, 3, H, W)``, of the size of use.
        features: As of :func:`align`.
        rounds: Repetitions of each timing, in turns, on the first batch. Defaults to 5.

    Returns:
        A row for each castled attention, in the order of the network.
    """
    batches = list(batches)
    pairs = attention_pairs(student, teacher)
    deployed = copy.deepcopy(student).train(False)
    if any(True for _ in castling_modules(deployed)):
        set_mask(deployed, 1.0)
    deployed = switch_to_deploy(deployed, inplace=True)
    hybrid = copy.deepcopy(teacher).train(False)
    expected = [features_of(hybrid, images, features) for images in batches]
    rows = []
    for name in pairs:
        original, castled = hybrid.get_submodule(name), deployed.get_submodule(name)
        args, kwargs = _call_of(original, hybrid, batches[0], features)
        seconds = paired_medians(
            {
                kind: functools.partial(attention, *args, **kwargs)
                for kind, attention in (("softmax", original), ("castled", castled))
            },
            rounds,
        )
        hybrid.set_submodule(name, castled)
        found = (features_of(hybrid, images, features) for images in batches)
        kept = min(mean_cosines(zip(found, expected, strict=True)))
        hybrid.set_submodule(name, original)
        softmax_ms, castled_ms = (1000 * seconds[k] for k in ("softmax", "castled"))
        rows.append(ScanRow(name, 1 - kept, softmax_ms, castled_ms))
    return rows


def _call_of(
    attention: nn.Module, model: nn.Module, images: Tensor, features: Features
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that an attention is given inside its model."""
    calls = []
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        features(model, images)
    finally:
        handle.remove()
    return calls[0]
