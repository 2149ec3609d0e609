"""Each image of a detector's batch at its own size, so that none sees padding.

mmdet pads the images of a batch to one size, and an attention over all tokens mixes the
padding into every one of them: what is found in an image depends on its neighbours. So
images of one padded size go through the network together, and others by themselves.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.mixer import TokenMixer

SWITCH = "own_size"
"""Of a detector's ``test_cfg`` and ``train_cfg``; True where it is not given."""

Groups = list[tuple[tuple[int, int], list[int]]]
"""Sizes ``(H, W)``, and the images of the batch that have them."""


def at_own_size(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``BaseDetector.forward``.

    In prediction, images of each size are a batch of their own. In training, each size
    passes the backbone and the neck alone, and heads see the maps padded with zeros.
    Detectors without an attention of this package are left as they are.
    """

    def wrapped(
        self: nn.Module, inputs: Any, data_samples: Any = None, mode: str = "tensor"
    ) -> Any:
        groups = _groups(self, inputs, data_samples, mode)
        if len(groups) < 2:
            return forward(self, inputs, data_samples, mode)
        if mode == "loss":
            with _features_of_each_size(self, groups):
                return forward(self, inputs, data_samples, mode)
        found = list(data_samples)
        for size, members in groups:
            samples = [data_samples[i] for i in members]
            for sample in samples:
                sample.set_metainfo(dict(batch_input_shape=size))
            results = forward(self, _crop(inputs, size, members), samples, mode)
            for index, result in zip(members, results, strict=True):
                found[index] = result
        return found

    return wrapped


def _groups(model: nn.Module, inputs: Any, data_samples: Any, mode: str) -> Groups:
    """The sizes in a batch; none where it is to stay together."""
    cfg = getattr(model, "train_cfg" if mode == "loss" else "test_cfg", None) or {}
    if (
        mode not in ("loss", "predict")
        or not isinstance(inputs, Tensor)
        or not isinstance(data_samples, Sequence)
        or not cfg.get(SWITCH, True)
    ):
        return []
    groups: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(data_samples):
        size = tuple(sample.metainfo.get("pad_shape", inputs.shape[2:])[:2])
        groups.setdefault(size, []).append(index)
    if len(groups) > 1 and _mixes_all_tokens(model, mode == "loss"):
        return list(groups.items())
    return []


def _mixes_all_tokens(model: nn.Module, training: bool) -> bool:
    """Whether a backbone has our attention, and no statistics of the whole batch."""
    parts = [getattr(model, name, None) for name in ("backbone", "neck")]
    modules = [m for part in parts if part is not None for m in part.modules()]
    return any(isinstance(m, TokenMixer) for m in modules) and not (
        training
        and (
            _strides(model) is None
            or any(
                isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
                for m in modules
            )
        )
    )


def _strides(model: nn.Module) -> list[tuple[int, int]] | None:
    """``(down, right)`` of each map, as the head that places priors on them says."""
    head = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
    strides = getattr(getattr(head, "prior_generator", None), "strides", None)
    return None if strides is None else [(down, right) for right, down in strides]


def _crop(inputs: Tensor, size: tuple[int, int], members: list[int]) -> Tensor:
    return inputs[members, :, : size[0], : size[1]]


@contextmanager
def _features_of_each_size(model: nn.Module, groups: Groups) -> Iterator[None]:
    """Let ``extract_feat`` take each size alone while the context lasts."""
    extract = model.extract_feat
    strides = _strides(model)

    def extract_feat(self: nn.Module, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        rows: list[Any] = [None] * len(batch_inputs)  # maps of each image
        for size, members in groups:
            features = extract(_crop(batch_inputs, size, members))
            if [list(m.shape[2:]) for m in features] != _shapes(size, strides):
                _warn(type(model).__name__)
                return extract(batch_inputs)
            for index, *row in zip(members, *features, strict=True):
                rows[index] = row
        whole = _shapes(batch_inputs.shape[2:], strides)
        return tuple(
            torch.stack([_pad(row, shape) for row in level])
            for level, shape in zip(zip(*rows, strict=True), whole, strict=True)
        )

    model.extract_feat = types.MethodType(extract_feat, model)
    try:
        yield
    finally:
        del model.extract_feat


def _shapes(size: Sequence[int], strides: list[tuple[int, int]]) -> list[list[int]]:
    """Shapes of the maps of an image of a size."""
    return [[-(-n // s) for n, s in zip(size, pair, strict=True)] for pair in strides]


def _pad(row: Tensor, shape: Sequence[int]) -> Tensor:
    below, right = shape[0] - row.shape[1], shape[1] - row.shape[2]
    return nn.functional.pad(row, (0, right, 0, below))


@functools.cache
def _warn(detector: str) -> None:
    """Once for each kind of detector."""
    logging.getLogger("mmcastling").warning(
        "%s: maps of backbone and neck are not those that the head expects at its "
        "strides, so images of a batch are trained together with their padding",
        detector,
    )
