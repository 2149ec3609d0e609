"""What is compared: attentions of two networks by name, and the features they give."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention import TokenMixer, is_castled
from mmcastling.castle.grid import noted_by
from mmcastling.deploy.verify import tensors_in
from mmcastling.errors import UserError

Features = Callable[[nn.Module, Tensor], Any]
Pairs = dict[str, tuple[nn.Module, nn.Module]]
Images = Callable[[int], Tensor]
"""The batch ``(B, 3, H, W)`` of a step, always the same for the same step."""


class AlignError(UserError, RuntimeError):
    """Two networks that cannot be aligned, or an alignment that went wrong."""


def attention_pairs(student: nn.Module, teacher: nn.Module) -> Pairs:
    """Castled attentions of the student, and the teacher's of the same names.

    Args:
        student: A castled network.
        teacher: The softmax network that it was made of, or one with its names.

    Raises:
        AlignError: If there is none, if the teacher lacks one, has it castled or with
            weights of another shape, or if both share weights.
    """
    pairs = {}
    originals = dict(teacher.named_modules())
    for path, module in student.named_modules():
        if not is_castled(module):
            continue
        name = _parent(path)
        # What was replaced may hold more than the attention: its windows, say.
        while name in originals and _differ(
            student, originals, holder := _parent(name)
        ):
            name = holder
        if name not in originals:
            raise AlignError(
                f"the teacher, a {type(teacher).__name__}, has no {name}, where the "
                "student has a castled attention: give the network that was castled, "
                "as it was before"
            )
        pairs[name] = student.get_submodule(name), originals[name]
        _check_original(name, *pairs[name])
    if not pairs:
        raise AlignError(
            f"the student, a {type(student).__name__}, has no castled attention: make "
            "it by mmcastling.castle(copy.deepcopy(teacher))"
        )
    if shared := {id(p) for p in student.parameters()} & {
        id(p) for p in teacher.parameters()
    }:
        raise AlignError(
            f"student and teacher share {len(shared)} weights, which would train the "
            "teacher, too: castle a copy, castle(copy.deepcopy(teacher))"
        )
    return pairs


def _check_original(name: str, castled: nn.Module, original: nn.Module) -> None:
    if any(is_castled(module) for module in original.modules()):
        raise AlignError(
            f"{name} of the teacher is castled, too: give the network with softmax "
            "attention, as it was before castle()"
        )
    shapes = {n: tuple(p.shape) for n, p in original.named_parameters()}
    for parameter, weight in castled.named_parameters():
        if (had := shapes.get(parameter)) not in (None, tuple(weight.shape)):
            raise AlignError(
                f"{name}.{parameter} has shape {tuple(weight.shape)} in the student "
                f"and {had} in the teacher: give the network that was castled"
            )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _differ(student: nn.Module, originals: dict[str, nn.Module], name: str) -> bool:
    return bool(name) and type(student.get_submodule(name)) is not type(
        originals.get(name)
    )


def default_features(model: nn.Module, images: Tensor) -> Any:
    """The features that the next part reads: the backbone's, or timm's last ones."""
    if isinstance(getattr(model, "backbone", None), nn.Module):
        return model.backbone(images)
    forward_features = getattr(model, "forward_features", None)
    return model(images) if forward_features is None else forward_features(images)


@contextmanager
def on_each_attention(
    student: nn.Module,
    teacher: nn.Module,
    pairs: Pairs,
    matched: Callable[[str, Tensor, Tensor], None],
    gradients: bool,
) -> Iterator[None]:
    """Run each student's attention on what its teacher's is given, with both outputs.

    The teacher's own tokens go on through the network, so that no block sees the errors
    of those before it.
    """

    def hook_of(name: str, attention: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, expected: Any) -> None:
            with torch.set_grad_enabled(gradients):
                found = next(tensors_in(attention(*args, **kwargs)))
                matched(name, found, next(tensors_in(expected)))

        return hook

    handles = [
        original.register_forward_hook(hook_of(name, castled), with_kwargs=True)
        for name, (castled, original) in pairs.items()
    ]
    try:
        with noted_by(student, teacher):
            yield
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(pairs: Pairs) -> list[str]:
    """The blocks that hold castled attentions: the nearest elements of a list."""
    blocks = []
    for name in pairs:
        while name and not name.rpartition(".")[2].isdigit():
            name = _parent(name)
        blocks.append(name)
    return [name for name in dict.fromkeys(blocks) if name]


@contextmanager
def outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The first tensor that each of some modules gives in the pass inside, by name."""
    found: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = next(tensors_in(output))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(name)) for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_evaluation(*models: nn.Module) -> Iterator[None]:
    """Have models in evaluation: what drops paths gives no features to compare."""
    were = [{m: m.training for m in model.modules()} for model in models]
    for model in models:
        model.train(False)
    try:
        yield
    finally:
        for training in were:
            for module, flag in training.items():
                module.training = flag


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """``|found - expected|^2 / |expected|^2`` in float32, a scalar."""
    expected = expected.float()
    difference = (found.float() - expected).square().sum()
    return difference / expected.square().sum().clamp_min(1e-12)


def widths_of(student: nn.Module) -> set[int]:
    """The numbers of channels of what castled attentions mix."""
    mixers = (m for m in student.modules() if isinstance(m, TokenMixer))
    return {mixer.num_heads * mixer.head_dims for mixer in mixers}


def cosines(found: Tensor, expected: Tensor, widths: Container[int] = ()) -> Tensor:
    """Of each position's channels: the last axis of tokens, the second of maps.

    Where the last axis of a map alone has one of ``widths``, as in timm's Swin
    ``(B, H, W, C)``, it is the last one there, too.
    """
    last = expected.shape[-1] in widths and expected.shape[1] not in widths
    axis = 1 if expected.ndim == 4 and not last else -1
    return nn.functional.cosine_similarity(found.float(), expected.float(), dim=axis)


@torch.no_grad()
def attention_errors(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    features: Features = default_features,
) -> dict[str, float]:
    """Relative squared error of each castled attention on the teacher's tokens."""
    errors: dict[str, list[float]] = {}
    pairs = attention_pairs(student, teacher)

    def note(name: str, found: Tensor, expected: Tensor) -> None:
        errors.setdefault(name, []).append(float(relative_error(found, expected)))

    with in_evaluation(student, teacher):
        for images in batches:
            with on_each_attention(student, teacher, pairs, note, gradients=False):
                features(teacher, images)
    return {name: sum(values) / len(values) for name, values in errors.items()}


@torch.no_grad()
def feature_similarity(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    features: Features = default_features,
) -> list[float]:
    """Mean cosine of the features of two networks, one number for each tensor."""
    with in_evaluation(student, teacher):
        found = (
            [features_of(model, images, features) for model in (student, teacher)]
            for images in batches
        )
        return mean_cosines(found, widths_of(student))


def features_of(model: nn.Module, images: Tensor, features: Features) -> list[Tensor]:
    """The tensors that a network's features consist of."""
    return list(tensors_in(features(model, images)))


def mean_cosines(
    batches: Iterable[Iterable[list[Tensor]]], widths: Container[int]
) -> list[float]:
    """Of pairs of features, a pair for each batch: one number for each tensor."""
    found = [
        [float(cosines(*pair, widths).mean()) for pair in zip(*both, strict=True)]
        for both in batches
    ]
    return [sum(level) / len(level) for level in zip(*found, strict=True)]
