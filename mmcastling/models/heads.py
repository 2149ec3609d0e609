"""Classification heads with a second output for what a teacher says."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.heads import ClsHead, DeiTClsHead, LeViTClsHead
from torch import Tensor

from mmcastling.models.folding import fold_for_inference
from mmcastling.registry import MODELS


@MODELS.register_module()
class LeViTHead(LeViTClsHead):
    """mmpretrain's LeViT head, which can be trained with two outputs and built fused.

    With ``distillation`` it has two classifiers on the same features, one for the
    labels and one for the teacher, as LeViT was trained; a
    :class:`~mmcastling.models.DistilledClassifier` trains each on its own target,
    anything else their mean, which is also what predicts. Weights of mmpretrain's head
    load by name.

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
        # mmpretrain's own deploy=True raises a TypeError.
        super().__init__(num_classes, distillation, in_channels, **kwargs)
        if deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Fold the batch norms into the layers behind them. Idempotent."""
        fold_for_inference(self)
        self.deploy = True

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Scores ``(B, num_classes)``: the mean of the outputs where there are two."""
        labels, taught = paired_scores(self, feats)
        return (labels + taught) / 2 if self.distillation else labels


def paired_scores(head: ClsHead, feats: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What a head says to the labels and to a teacher; the same for one output."""
    if isinstance(head, LeViTClsHead):
        x = head.pre_logits(feats)
        scores = head.head(x)
        return scores, head.head_dist(x) if head.distillation else scores
    if isinstance(head, DeiTClsHead):
        cls_token, dist_token = head.pre_logits(feats)
        return head.layers.head(cls_token), head.layers.head_dist(dist_token)
    scores = head(feats)
    return scores, scores
