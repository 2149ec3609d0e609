"""A trained classifier that teaches another: frozen, and none of its modules."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DefaultScope
from mmpretrain.apis import ModelHub
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from torch import Tensor, nn

from mmcastling.checkpoint import load_weights
from mmcastling.errors import CheckpointError, OptionError, UnavailableError
from mmcastling.models.pretrained import read_checkpoint
from mmcastling.registry import model_spec
from mmcastling.verbs import restore_mask


class Teacher:
    """A frozen classifier, always in evaluation, that nothing of PyTorch sees.

    It is no ``nn.Module``, so that a student that holds it neither saves nor trains
    nor averages it, and is loaded without it. It is built when it is first needed:
    testing and converting a distilled model do without its checkpoint. Copies of a
    student share it.

    Args:
        model: The config of a classifier (mmpretrain's ``TimmClassifier`` makes it one
            of timm's); a name that ``mmpretrain.get_model`` knows, or the path of a
            config file, whose ``model`` is meant; or a classifier that is built and
            trained, which is frozen.
        checkpoint: Its weights, a file or address; every weight must fit. None for the
            published weights of a name, for timm's by ``pretrained=True``, and where
            the model is built already. Defaults to None.

    Raises:
        ValueError: If ``model`` is none of these, or is built already and has a
            checkpoint as well.
    """

    def __init__(
        self,
        model: Mapping[str, Any] | str | os.PathLike[str] | nn.Module,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(model, (Mapping, str, os.PathLike, nn.Module)):
            raise OptionError(
                f"teacher {model!r} must be the config of a model, a name of "
                "mmpretrain's, the path of a config file, or a classifier"
            )
        if isinstance(model, nn.Module) and checkpoint is not None:
            raise OptionError(
                f"the teacher is a {type(model).__name__} that is built already: load "
                f"{checkpoint} into it and leave teacher_checkpoint out"
            )
        self._spec = model
        self._checkpoint = checkpoint
        self._module: nn.Module | None = None
        self._convert: Callable[[Tensor], Tensor] = nn.Identity()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    @property
    def is_ready(self) -> bool:
        """Whether it has been built."""
        return self._module is not None

    @torch.compiler.disable
    def prepare(self, student: nn.Module) -> None:
        """Build, load and freeze it, and compare its preprocessing with a student's.

        Where both are known and differ, inputs are converted: a ``data_preprocessor``
        in its config counts, and timm's statistics for timm's own weights.

        Raises:
            ValueError: If it is not found, has no weights, or other classes.
            CheckpointError: If its checkpoint cannot be read or does not fit.
        """
        # Built beside the student's randomness: with the same seed it begins alike,
        # taught or not.
        with torch.random.fork_rng(devices=[]):
            module, timm_weights = self._build()
        check_same_classes(_num_classes_of(module), _num_classes_of(student))
        self._module = module.requires_grad_(False)
        given, wanted = _statistics(student), _statistics(module, timm_weights)
        if given is not None and wanted is not None:
            self._convert = functools.partial(
                _normalize_anew, given=given, wanted=wanted
            )

    def _build(self) -> tuple[nn.Module, bool]:
        """The model with its weights, and whether those are timm's own."""
        if isinstance(self._spec, nn.Module):
            return self._spec, False
        spec, published = _model_config(self._spec)
        checkpoint = self._checkpoint or published
        timm_weights = checkpoint is None and bool(spec.get("pretrained"))
        if checkpoint is None and not timm_weights:
            raise OptionError(
                f"the teacher, a {spec.get('type')}, has no weights and would teach "
                "noise: give model.teacher_checkpoint=FILE"
            )
        if not timm_weights:
            spec.pop("pretrained", None)
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            module = MMPRETRAIN_MODELS.build(spec)
        if checkpoint is not None:
            try:
                loaded = read_checkpoint(str(checkpoint))
                restore_mask(module, loaded)
                load_weights(module, loaded, str(checkpoint))
            except CheckpointError as error:
                raise CheckpointError(f"teacher: {error}") from error
        return module, timm_weights

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` for the student's preprocessed images.

        Raises:
            RuntimeError: If it has not been prepared.
            ValueError: If it returns something else.
        """
        module = self._module
        if module is None:
            raise UnavailableError(
                "the teacher has not been prepared: call prepare first"
            )
        if module.training:  # a classifier that was given is also in other hands
            module.eval()
        weight = next(module.parameters(), None)
        if weight is not None and weight.device != inputs.device:
            module.to(inputs.device)
        scores = module(self._convert(inputs))
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            shape = f" {tuple(scores.shape)}" if isinstance(scores, Tensor) else ""
            raise OptionError(
                f"the teacher, a {type(module).__name__}, returns a "
                f"{type(scores).__name__}{shape} for images: expected logits (B, "
                "classes), which an image classifier with a head returns"
            )
        return scores


def check_same_classes(theirs: int | None, own: int | None) -> None:
    """Raise unless a teacher and a student, where known, have equal classes."""
    if None not in (theirs, own) and theirs != own:
        raise OptionError(
            f"the teacher has {theirs} classes, the student {own}: a student learns "
            "from a teacher of the same classes. Use a teacher trained on the same "
            "data set, or set the student's head.num_classes"
        )


def _num_classes_of(model: nn.Module) -> int | None:
    """Classes of mmpretrain's classifiers, and of timm's models, bare or inside one."""
    for holder in (getattr(model, "head", None), getattr(model, "model", None), model):
        count = getattr(holder, "num_classes", None)
        if isinstance(count, int):
            return count
    return None


Statistics = tuple[Tensor, Tensor, bool]
"""Mean and std ``(C, 1, 1)`` of images from 0 to 255, and whether BGR is reversed."""


def _statistics(model: nn.Module, timm_weights: bool = False) -> Statistics | None:
    """How a model's images are normalised, None where nobody says."""
    own = getattr(model, "data_preprocessor", None)
    if isinstance(getattr(own, "mean", None), Tensor):
        to_rgb = bool(getattr(own, "to_rgb", False))
        return own.mean.detach().cpu(), own.std.detach().cpu(), to_rgb
    facts = getattr(getattr(model, "model", model), "pretrained_cfg", None) or {}
    if not timm_weights or not {"mean", "std"} <= set(facts):
        return None
    mean, std = (torch.tensor(facts[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return 255 * mean, 255 * std, True  # timm reads RGB on the scale 0 to 1


def _normalize_anew(inputs: Tensor, given: Statistics, wanted: Statistics) -> Tensor:
    mean, std, to_mean, to_std = (v.to(inputs) for v in (*given[:2], *wanted[:2]))
    images = inputs * std + mean
    if given[2] != wanted[2] and images.shape[1] == 3:
        images = images.flip(1)
    return (images - to_mean) / to_std


def _model_config(
    spec: Mapping[str, Any] | str | os.PathLike[str],
) -> tuple[dict[str, Any], str | None]:
    """The config of a model, and the address of its published weights if known."""
    if isinstance(spec, Mapping):
        return copy.deepcopy(dict(spec)), None
    spec, published = os.fspath(spec), None
    try:
        if "::" in spec:
            cfg = get_config(spec)
        elif spec.endswith((".py", ".json", ".yaml", ".yml")):
            cfg = Config.fromfile(spec)
        else:
            cfg, published = (found := ModelHub.get(spec)).config, found.weights
    except (FileNotFoundError, ValueError) as error:
        raise OptionError(
            f"teacher {spec} does not exist: give the path of a config file, or a name "
            "that mmpretrain.list_models() has"
        ) from error
    if "model" not in cfg:
        raise OptionError(f"teacher {spec} is a config without a model")
    return model_spec(cfg), published
