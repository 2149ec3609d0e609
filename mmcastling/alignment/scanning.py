"""What castling each attention alone costs, and what it saves; which to keep."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.alignment.pairs import (
    AlignError,
    Features,
    attention_pairs,
    default_features,
    features_of,
    mean_cosines,
    widths_of,
)
from mmcastling.analysis import paired_medians
from mmcastling.castle import castle
from mmcastling.castle.grid import noted_by
from mmcastling.castle.swap import AUTOMATIC_KEEP
from mmcastling.errors import OptionError
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

    Raises:
        AlignError: If the networks do not belong together, or features are not finite.
        ValueError: If there is no batch, or no round.
    """
    batches = list(batches)
    if not batches or rounds < 1:
        raise OptionError(
            f"{len(batches)} batches and rounds={rounds}: give at least one of each"
        )
    pairs = attention_pairs(student, teacher)
    deployed, hybrid = copy.deepcopy(student), copy.deepcopy(teacher)
    for model in (deployed, hybrid):
        model.train(False)  # which some return nothing from
    if any(True for _ in castling_modules(deployed)):
        set_mask(deployed, 1.0)
    deployed = switch_to_deploy(deployed, inplace=True)
    expected = [features_of(hybrid, images, features) for images in batches]
    rows, widths = [], widths_of(student)
    with noted_by(deployed, hybrid):
        for name in pairs:
            original, castled = hybrid.get_submodule(name), deployed.get_submodule(name)
            args, kwargs = _call_of(original, hybrid, batches[0], features)
            seconds = paired_medians(
                {
                    "softmax": functools.partial(original, *args, **kwargs),
                    "castled": functools.partial(castled, *args, **kwargs),
                },
                rounds,
            )
            hybrid.set_submodule(name, castled)
            found = (features_of(hybrid, images, features) for images in batches)
            kept = min(mean_cosines(zip(found, expected, strict=True), widths))
            hybrid.set_submodule(name, original)
            if not math.isfinite(kept):
                raise AlignError(
                    f"with {name} castled, features are not finite numbers: check the "
                    "weights of the network, and the pictures"
                )
            milliseconds = (1000 * value for value in seconds.values())
            rows.append(ScanRow(name, 1 - kept, *milliseconds))
    return rows


def choose_kept(rows: Sequence[ScanRow], budget: int | float) -> list[str]:
    """The attentions that should stay softmax, most damage per millisecond first.

    Args:
        rows: What :func:`scan` has found.
        budget: How many may stay, an int; or which share of all milliseconds that
            castling saves must still be saved, a float between 0 and 1.

    Raises:
        OptionError: If the budget is none of these, keeps everything or keeps nothing.
    """
    check_budget(budget, len(rows))
    ranked = sorted(
        rows, key=lambda row: row.damage / max(row.saved_ms, 1e-6), reverse=True
    )
    if isinstance(budget, int):
        # Each costs one, whatever it saves: the most harmful ones.
        ranked = sorted(rows, key=lambda row: row.damage, reverse=True)
        return [row.name for row in ranked[:budget]]
    total = sum(max(0.0, row.saved_ms) for row in rows)
    kept, left = [], total
    for row in ranked:
        saved = max(0.0, row.saved_ms)
        if left - saved >= budget * total:
            kept.append(row.name)
            left -= saved
    if not kept or len(kept) == len(rows):
        least = min(row.saved_ms for row in rows)
        raise OptionError(
            f"budget={budget!r} cannot be met: castling saves {total:.2f} ms in all, "
            f"at least {least:.2f} ms in each of {len(rows)} attentions, so that "
            f"{len(kept)} of them would be kept"
        )
    return kept


def check_budget(budget: int | float, count: int) -> None:
    """OptionError where no scan of so many attentions could meet a budget."""
    if isinstance(budget, int) and not isinstance(budget, bool):
        if not 1 <= budget < count:
            raise OptionError(
                f"budget={budget}: of {count} attentions 1 to {count - 1} can be kept"
            )
    elif not isinstance(budget, float) or not 0.0 < budget < 1.0:
        raise OptionError(
            f"budget={budget!r}: give how many attentions may be kept, as 2, or which "
            "share of the saved time must remain, as 0.8"
        )


def keep_automatically(
    model: nn.Module, images: Iterable[Tensor], budget: int | float, **options: Any
) -> list[str]:
    """Castle a copy of a model, scan it, and choose: ``castle(keep='auto')``."""
    student = castle(copy.deepcopy(model), **options)
    check_budget(budget, len(attention_pairs(student, model)))
    return choose_kept(scan(student, model, images), budget)


AUTOMATIC_KEEP.append(keep_automatically)


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
