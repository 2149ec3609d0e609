"""An image classifier that learns from a teacher as well as from labels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.heads import ClsHead
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmcastling.errors import OptionError, UnavailableError
from mmcastling.models.heads import paired_scores
from mmcastling.models.teacher import Teacher, check_same_classes
from mmcastling.registry import MODELS

MODES = ("hard", "soft")


@MODELS.register_module()
class DistilledClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with a teacher while it trains.

    From "Training data-efficient image transformers & distillation through attention"
    (Touvron et al., ICML 2021), section 4. With student logits ``s``, teacher logits
    ``t``, labels ``y`` and softmax ``f``:

    - hard: ``(1 - alpha) * L(s, y) + alpha * CE(s', argmax t)``
    - soft: ``(1 - alpha) * L(s, y) + alpha * T^2 * KL(f(t / T) || f(s' / T))``

    ``L`` is the head's loss, so label smoothing, mixup and CutMix work as ever; the
    teacher sees the same mixed images. Both terms are means over the batch, KL a sum
    over the classes (DeiT's code divides by their number as well). ``s'`` is ``s``,
    unless the head has a second output for the teacher: ``mmcastling.LeViTHead`` with
    ``distillation=True``, or mmpretrain's ``DeiTClsHead`` behind a backbone with a
    distillation token.

    The teacher is built when training begins (``init_weights``), frozen and in
    evaluation; it is in no checkpoint, no optimizer and no copy of the weights, and
    :meth:`switch_to_deploy` drops it. The config of a deployed model is that of a plain
    ``ImageClassifier``.

    Args:
        backbone: As for ``ImageClassifier``.
        teacher: A classifier with the same classes, and
        teacher_checkpoint: its weights, as :class:`~mmcastling.models.Teacher` takes
            them. Defaults to None.
        mode: ``'hard'`` or ``'soft'``. Defaults to ``'hard'``.
        alpha: Share of the teacher in the loss, in [0, 1]. Defaults to 0.5, as DeiT for
            hard distillation.
        temperature: ``T`` of soft distillation, above 0; DeiT compares ``T = 3`` with
            ``alpha = 0.1``. Defaults to 1.
        **kwargs: Further arguments of ``ImageClassifier``: ``neck``, ``head``,
            ``train_cfg``, ``data_preprocessor`` and ``init_cfg``.

    Raises:
        ValueError: If an option is out of range or the head cannot be taught.
    """

    def __init__(
        self,
        backbone: dict[str, Any] | nn.Module,
        teacher: Mapping[str, Any] | str | os.PathLike[str] | nn.Module,
        teacher_checkpoint: str | os.PathLike[str] | None = None,
        mode: str = "hard",
        alpha: float = 0.5,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if mode not in MODES:
            raise OptionError(f"mode {mode!r} is not known: choose one of {MODES}")
        if not 0.0 <= alpha <= 1.0:
            raise OptionError(f"alpha={alpha!r} is no share: give a number from 0 to 1")
        if not temperature > 0.0:
            raise OptionError(f"temperature={temperature!r} must be above 0")
        super().__init__(backbone, **kwargs)
        if not isinstance(self.head, ClsHead):
            raise OptionError(
                f"head {type(self.head).__name__} has no logits to teach: give a head "
                "derived from mmpretrain's ClsHead"
            )
        self.mode = mode
        self.alpha = alpha
        self.temperature = temperature
        self._teacher: Teacher | None = Teacher(teacher, teacher_checkpoint)

    def init_weights(self) -> None:
        """Initialise the weights and prepare the teacher, before training begins.

        Raises:
            ValueError: If the teacher has no weights or other classes.
            CheckpointError: If its checkpoint cannot be read or does not fit.
        """
        self._ready_teacher()  # before anything is done that an error would waste
        super().init_weights()

    def _ready_teacher(self) -> Teacher:
        if self._teacher is None:
            raise UnavailableError(
                "this classifier has been deployed and has no teacher any more: train "
                "the one it was deployed from"
            )
        if not self._teacher.is_ready:
            self._teacher.prepare(self)
        return self._teacher

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            inputs: Preprocessed images ``(B, C, H, W)``.
            data_samples: Their labels.

        Returns:
            The head's losses times ``1 - alpha``, and ``loss_distillation``.
        """
        target = self._ready_teacher()(inputs)
        scores, distilled = paired_scores(self.head, self.extract_feat(inputs))
        check_same_classes(target.shape[1], distilled.shape[1])
        losses = {
            name: value * (1.0 - self.alpha) if "loss" in name else value
            for name, value in self.head._get_loss(scores, data_samples).items()
        }
        losses["loss_distillation"] = self.alpha * self._distillation(distilled, target)
        return losses

    def _distillation(self, scores: Tensor, target: Tensor) -> Tensor:
        if self.mode == "hard":
            return F.cross_entropy(scores, target.argmax(dim=1))
        own, theirs = (
            F.log_softmax(logits.float() / self.temperature, dim=1)
            for logits in (scores, target)
        )
        divergence = F.kl_div(own, theirs, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2

    def switch_to_deploy(self) -> None:
        """Drop the teacher. Idempotent."""
        self._teacher = None

    @staticmethod
    def deployed_config(config: dict[str, Any]) -> dict[str, Any]:
        """The config of what is left when the model of a config is deployed."""
        own = ("teacher", "teacher_checkpoint", "mode", "alpha", "temperature")
        kept = {key: value for key, value in config.items() if key not in own}
        return {**kept, "type": "mmpretrain.ImageClassifier"}
