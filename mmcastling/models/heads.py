"""Classification heads with a second output for what a teacher says."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.heads import ClsHead, DeiTClsHead, LeViTClsHead
from torch import Tensor

from mmcastling.registry import MODELS


@MODELS.register_module()
class LeViTHead(LeViTClsHead):
    """mmpretrain's LeViT head, which can be trained with two outputs and built fused.

    The names of its parameters are those of mmpretrain's ``LeViTClsHead``. With
    ``distillation`` it has two classifiers on the same features, one for the labels and
    one for the teacher, as LeViT was trained; a
    :class:`~mmcastling.models.DistilledClassifier` trains each on its own target,
    anything else their mean, which is also what predicts.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the pooled features.
        distillation: Have the second output. Defaults to True.
        deploy: Build the fused graph, without batch norms. Defaults to False.
        **kwargs: Arguments of mmpretrain's ``ClsHead``, such as ``loss``.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        distillation: bool = True,
        deploy: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            distillation=distillation,
            in_channels=in_channels,
            **kwargs,
        )
        if deploy:
            self.switch_to_deploy()

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Scores ``(B, num_classes)``: the mean of the outputs where there are two."""
        x = self.pre_logits(feats)
        if not self.distillation:
            return self.head(x)
        return (self.head(x) + self.head_dist(x)) / 2


def paired_scores(head: ClsHead, feats: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What a head says to the labels and what it says to a teacher.

    Args:
        head: A head of mmpretrain or of ours.
        feats: What it is given by the neck, or the backbone.

    Returns:
        Two scores ``(B, num_classes)``; the same one twice for a head with one output.
    """
    if isinstance(head, LeViTClsHead) and head.distillation:
        x = head.pre_logits(feats)
        return head.head(x), head.head_dist(x)
    if isinstance(head, DeiTClsHead):
        cls_token, dist_token = head.pre_logits(feats)
        return head.layers.head(cls_token), head.layers.head_dist(dist_token)
    scores = head(feats)
    return scores, scores
