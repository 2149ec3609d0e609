"""Inputs to compare a file with torch at: what of an image batch's shape is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

IMAGE_AXES = {"batch": 0, "height": 2, "width": 3}
# What may stay free, the most first.
_CHOICES = (("batch", "height", "width"), ("height", "width"), ("batch",), ())


@dataclass
class Case:
    """Inputs to compare at, and what has to be free for them."""

    inputs: tuple[Tensor, ...]
    free: set[str]


def cases_of(
    run: Callable[[tuple[Tensor, ...]], Any],
    convolutions: Sequence[nn.Conv2d],
    inputs: tuple[Tensor, ...],
    say: Callable[[str], None],
) -> dict[str, Case]:
    """Inputs that a model takes, by the shape of their first one.

    Args:
        run: The model in torch, called with inputs; raises for those that it does not
            take.
        convolutions: Its own, the first of which says in which steps sizes go.
        inputs: The example.
        say: Called with what the model refuses.
    """
    cases = {shape_text(inputs): Case(inputs, set())}
    first = inputs[0]
    if not (first.ndim == 4 and first.is_floating_point()):
        return cases
    batch, height, width = first.shape[0], *first.shape[2:]
    accepted: list[tuple[int, int]] = []
    refusal: Exception | None = None
    uneven = (height + 3, width + 5)
    for sizes in _sizes(convolutions, height, width):
        for size in sizes:
            if size == uneven and not accepted:
                continue  # of a model that rounds it to the one size that it takes
            try:
                case = Case(_resized(inputs, batch, size), {"height", "width"})
                run(case.inputs)
            except Exception as error:  # the model's own
                refusal = error
                continue
            cases[shape_text(case.inputs)] = case
            accepted.append(size)
            break
    if not accepted:
        say(
            f"height and width fixed: the model refuses other images than "
            f"{height}x{width}: {first_line(refusal)}"
        )
    for count in sorted({1, 3, 5} - {batch}):
        for size in [(height, width), *accepted[-1:]]:
            free = {"batch"} | ({"height", "width"} if size in accepted else set())
            try:
                case = Case(_resized(inputs, count, size), free)
                run(case.inputs)
            except Exception as error:
                say(f"the model refuses {count} images: {first_line(error)}")
                break
            cases[shape_text(case.inputs)] = case
    return cases


def _sizes(
    convolutions: Sequence[nn.Conv2d], height: int, width: int
) -> Iterator[list[tuple[int, int]]]:
    """Sizes to try, of each list the first that the model takes."""
    steps = [*(conv.stride[0] for conv in convolutions[:1]), 32, 28]
    yield [(height + step, width + 2 * step) for step in steps]
    # What torch has assumed of the traced image shows at a higher one, a smaller one,
    # and one whose sides no patch divides.
    yield [(height + 2 * step, width) for step in steps]
    yield [(height - step, width - step) for step in steps if min(height, width) > step]
    yield [(height + 3, width + 5)]
    # 8 x 32 tokens are as many as 16 x 16.
    yield [(8 * step, 32 * step) for step in steps if step >= 8] + [(128, 512)]


def _resized(
    inputs: tuple[Tensor, ...], batch: int, size: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Inputs with other images, and as many rows of the others as there are images."""
    images, *others = inputs
    generator = torch.Generator().manual_seed(0)
    shape = (batch, images.shape[1], *size)
    new = torch.randn(shape, generator=generator).to(images.dtype)
    rows = torch.arange(batch) % len(images)
    others = [x[rows] if x.ndim and len(x) == len(images) else x for x in others]
    return new, *others


def choices(cases: Mapping[str, Case]) -> list[tuple[str, ...]]:
    """What may be left free for such inputs, the most first."""
    possible = set().union(*(case.free for case in cases.values()))
    return [choice for choice in _CHOICES if set(choice) <= possible]


def free_axes(inputs: tuple[Tensor, ...], dynamic: Sequence[str]) -> tuple[Any, ...]:
    """What :func:`torch.export.export` is told of each input."""
    images = {IMAGE_AXES[name]: Dim.DYNAMIC for name in dynamic}
    rows = {0: Dim.DYNAMIC} if "batch" in dynamic else {}
    count = len(inputs[0])
    others = [rows if x.ndim and len(x) == count else {} for x in inputs[1:]]
    return (images, *others)


def shape_text(inputs: Sequence[Tensor]) -> str:
    """The shape of the first input, ``1x3x64x64``."""
    return "x".join(map(str, inputs[0].shape))


def first_line(error: BaseException | None) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
