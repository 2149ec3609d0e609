"""How far a pruned model's features are from those of the model it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors inside nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Feature maps of a batch: from backbone and neck, or of the bare module.

    Args:
        model: A classifier, detector, segmentor, or anything that takes images.
        images: A preprocessed batch ``(B, C, H, W)``.
    """
    extract = getattr(model, "extract_feat", model)
    return list(tensors_in(extract(images)))


def largest_difference(
    model: nn.Module, other: nn.Module, batches: Iterable[Tensor]
) -> tuple[float, float]:
    """The largest absolute difference between two models' features.

    Args:
        model: The reference, in evaluation mode.
        other: The model compared with it, in evaluation mode.
        batches: Preprocessed images ``(B, C, H, W)``.

    Returns:
        The largest difference, and the largest magnitude in the reference, both over
        all batches. NaN where a feature is not finite.
    """
    pairs = [
        difference_of(features(model, images), features(other, images))
        for images in batches
    ]
    largest = torch.tensor([(0.0, 0.0), *pairs], dtype=torch.float64).amax(0)
    return largest[0].item(), largest[1].item()


def difference_of(
    outputs: Sequence[Tensor], others: Sequence[Tensor]
) -> tuple[float, float]:
    """The largest absolute difference between the outputs of two models.

    Args:
        outputs: Those of the reference.
        others: Those of the model compared with it, in the same order.

    Returns:
        The largest difference and the largest magnitude in the reference. NaN where a
        value is not finite.
    """
    differences, magnitudes = [torch.zeros(())], [torch.zeros(())]
    for a, b in zip(outputs, others, strict=True):
        differences.append((a - b).abs().max().cpu())
        magnitudes.append(a.abs().max().cpu())
    # Python's max() would pass over a NaN.
    return torch.stack(differences).max().item(), torch.stack(magnitudes).max().item()
