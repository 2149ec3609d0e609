"""A trained classifier that teaches another: frozen, and none of its modules."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmcastling.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
)
from mmcastling.compat.safe_loading import safe_mmengine_loading
from mmcastling.registry import model_spec
from mmcastling.verbs import restore_mask


@dataclass(frozen=True)
class Normalisation:
    """How images become a network's input.

    Attributes:
        mean: Mean per channel ``(C, 1, 1)`` on the scale 0 to 255.
        std: Standard deviation, alike.
        to_rgb: Whether channels that were read as BGR are reversed.
    """

    mean: Tensor
    std: Tensor
    to_rgb: bool

    @classmethod
    def of(cls, preprocessor: nn.Module | None) -> Normalisation | None:
        """That of a data preprocessor, None where it does not normalise."""
        mean = getattr(preprocessor, "mean", None)
        if not isinstance(mean, Tensor):
            return None
        to_rgb = bool(getattr(preprocessor, "to_rgb", False))
        return cls(mean.detach().cpu(), preprocessor.std.detach().cpu(), to_rgb)

    @classmethod
    def of_timm(cls, model: nn.Module) -> Normalisation | None:
        """That of timm's own weights; timm reads RGB on the scale 0 to 1."""
        facts = getattr(getattr(model, "model", model), "pretrained_cfg", None) or {}
        if "mean" not in facts or "std" not in facts:
            return None
        mean, std = (
            torch.tensor(facts[key]).view(-1, 1, 1) * 255 for key in ("mean", "std")
        )
        return cls(mean, std, to_rgb=True)

    def convert(self, inputs: Tensor, target: Normalisation) -> Tensor:
        """Turn input ``(B, C, H, W)`` of this normalisation into that of another."""
        mean, std, to_mean, to_std = (
            value.to(inputs) for value in (self.mean, self.std, target.mean, target.std)
        )
        images = inputs * std + mean
        if self.to_rgb != target.to_rgb and images.shape[1] == 3:
            images = images.flip(1)
        return (images - to_mean) / to_std


class Teacher:
    """A frozen classifier, always in evaluation, that nothing of PyTorch sees.

    It is no ``nn.Module``, so that a student that holds it neither saves nor trains
    nor averages it, and is loaded without it. It is built when it is first needed:
    testing and converting a distilled model do without its checkpoint. Copies of a
    student share it.

    Args:
        model: The config of a classifier (mmpretrain's ``TimmClassifier`` makes it one
            of timm's); the path of a config file, or ``package::path``, whose ``model``
            is meant; or a classifier that is built and trained, which is frozen.
        checkpoint: Its weights, a file or address; every weight must fit. None where
            the model is built already, or its config says ``pretrained=True`` (timm) or
            has ``init_cfg=dict(type='Pretrained', ...)``. Defaults to None.

    Raises:
        ValueError: If ``model`` is none of these, or has weights of its own as well as
            a checkpoint.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | str | os.PathLike[str] | nn.Module,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model, (Mapping, str, os.PathLike, nn.Module)):
            raise ValueError(
                f"teacher {model!r} must be the config of a model, the path of a "
                "config file, or a classifier"
            )
        if isinstance(model, nn.Module) and checkpoint is not None:
            raise ValueError(
                f"the teacher is a {type(model).__name__} that is built already: load "
                f"{checkpoint} into it and leave teacher_checkpoint out"
            )
        self._spec = model
        self._checkpoint = checkpoint
        self._module: nn.Module | None = None
        self._from: Normalisation | None = None
        self._to: Normalisation | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    @property
    def is_ready(self) -> bool:
        """Whether it has been built."""
        return self._module is not None

    @torch.compiler.disable
    def prepare(self, student: nn.Module, num_classes: int | None) -> None:
        """Build, load and freeze it, for a student.

        Where its preprocessing is known and differs from the student's, inputs are
        converted: a ``data_preprocessor`` in its config, or timm's own statistics for
        timm's own weights. Otherwise it is given what the student is.

        Args:
            student: Its ``data_preprocessor`` says how inputs were normalised; the
                teacher goes to its device.
            num_classes: Number of classes that the student has, None where unknown.

        Raises:
            ValueError: If it has no weights, or another number of classes.
            CheckpointError: If its checkpoint cannot be read or does not fit.
        """
        if self.is_ready:
            return
        # Built beside the student's randomness: with the same seed it begins alike,
        # taught or not.
        with torch.random.fork_rng(devices=[]):
            module, pretrained_timm = self._build()
        theirs = num_classes_of(module)
        if None not in (theirs, num_classes) and theirs != num_classes:
            raise ValueError(_other_classes(theirs, num_classes))
        module.requires_grad_(False)
        module.eval()
        device = next((p.device for p in student.parameters()), None)
        if device is not None:
            module.to(device)
        self._from = Normalisation.of(getattr(student, "data_preprocessor", None))
        self._to = Normalisation.of(getattr(module, "data_preprocessor", None))
        if self._to is None and pretrained_timm:
            self._to = Normalisation.of_timm(module)
        self._module = module

    def _build(self) -> tuple[nn.Module, bool]:
        """The model with its weights, and whether those are timm's own."""
        if isinstance(self._spec, nn.Module):
            return self._spec, False
        spec = _model_config(self._spec)
        checkpoint = self._checkpoint
        init_cfg = spec.get("init_cfg")
        if isinstance(init_cfg, Mapping) and init_cfg.get("type") == "Pretrained":
            checkpoint = checkpoint or init_cfg["checkpoint"]
            spec.pop("init_cfg")
        own = checkpoint is None and bool(spec.get("pretrained"))
        if checkpoint is None and not own:
            raise ValueError(
                f"the teacher, a {spec.get('type')}, has no weights and would teach "
                "noise: give model.teacher_checkpoint=FILE"
            )
        if not own:
            spec.pop("pretrained", None)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            module = MMPRETRAIN_MODELS.build(spec)
        if checkpoint is not None:
            try:
                loaded = _read(checkpoint)
                load_weights(module, loaded, str(checkpoint))
            except CheckpointError as error:
                raise CheckpointError(f"teacher: {error}") from error
            restore_mask(module, loaded)
        return module, own

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Classify what a student is given.

        Args:
            inputs: The student's preprocessed images ``(B, C, H, W)``.

        Returns:
            Logits ``(B, num_classes)``, without a gradient.

        Raises:
            RuntimeError: If it has not been prepared.
            ValueError: If it returns something else.
        """
        module = self._module
        if module is None:
            raise RuntimeError("the teacher has not been prepared: call prepare first")
        if module.training:  # a classifier that was given is also in other hands
            module.eval()
        weight = next(module.parameters(), None)
        if weight is not None and weight.device != inputs.device:
            module.to(inputs.device)
        if self._from is not None and self._to is not None:
            inputs = self._from.convert(inputs, self._to)
        scores = module(inputs)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            raise ValueError(
                f"the teacher, a {type(module).__name__}, returns "
                f"{_describe(scores)} for images: expected logits (B, classes), which "
                "an image classifier with a head returns"
            )
        return scores


def num_classes_of(model: nn.Module) -> int | None:
    """Number of classes of a classifier, None where it does not say.

    Knows mmpretrain's classifiers (``head.num_classes``) and timm's models, bare or
    inside mmpretrain's ``TimmClassifier``.
    """
    for holder in (getattr(model, "head", None), getattr(model, "model", None), model):
        count = getattr(holder, "num_classes", None)
        if isinstance(count, int):
            return count
    return None


def check_same_classes(theirs: Tensor, own: Tensor) -> None:
    """Raise unless a teacher's logits are of as many classes as the student's.

    Raises:
        ValueError: If not.
    """
    if theirs.shape[1] != own.shape[1]:
        raise ValueError(_other_classes(theirs.shape[1], own.shape[1]))


def _other_classes(theirs: int, own: int) -> str:
    return (
        f"the teacher has {theirs} classes, the student {own}: a student learns from a "
        "teacher of the same classes. Use a teacher trained on the same data set, or "
        "set the student's head.num_classes"
    )


def _model_config(spec: Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    if isinstance(spec, Mapping):
        return copy.deepcopy(dict(spec))
    path = os.fspath(spec)
    try:
        cfg = get_config(path) if "::" in path else Config.fromfile(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"teacher {path} does not exist: give the path of a config file"
        ) from error
    if "model" not in cfg:
        raise ValueError(f"teacher {path} is a config without a model")
    return model_spec(cfg)


def _read(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    if "://" not in str(checkpoint):
        return load_checkpoint(checkpoint)
    with safe_mmengine_loading():
        return CheckpointLoader.load_checkpoint(str(checkpoint), map_location="cpu")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a {type(value).__name__}"
