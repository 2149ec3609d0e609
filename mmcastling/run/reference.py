"""What torch says about one preprocessed image: what an exported file must say too."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmcastling.deploy import tensors_in
from mmcastling.runtime import ExportMetadata


@torch.no_grad()
def reference_outputs(
    model: nn.Module, metadata: ExportMetadata, images: Tensor, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The toolbox's own prediction, by the names of an exported file's outputs.

    Args:
        model: The deployed model in evaluation mode.
        metadata: What the file says.
        images: One preprocessed image ``(1, 3, H, W)``.
        size: ``(H, W)`` of the image without padding.

    Returns:
        Arrays by name; a detector's ``masks`` are bool ``(N, *size)``.
    """
    outputs = dict(
        backbone=_features,
        classifier=_scores,
        segmentor=_logits,
        detector=_detections,
    )[metadata.kind](model, images, size)
    return {name: value.cpu().numpy() for name, value in outputs.items()}


def _features(model: nn.Module, images: Tensor, size: Any) -> dict[str, Tensor]:
    features = tensors_in(model.backbone(images))
    return {f"feature_{index}": value for index, value in enumerate(features)}


def _scores(model: nn.Module, images: Tensor, size: Any) -> dict[str, Tensor]:
    (sample,) = model.predict(images)
    return {"scores": sample.pred_score[None]}


def _logits(model: nn.Module, images: Tensor, size: Any) -> dict[str, Tensor]:
    shape = tuple(images.shape[2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape)
    return {"logits": model.encode_decode(images, [meta])}


def _detections(
    model: nn.Module, images: Tensor, size: tuple[int, int]
) -> dict[str, Tensor]:
    shape = tuple(images.shape[2:])
    sample = BaseDataElement(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=shape,
            batch_input_shape=shape,
            scale_factor=(1.0, 1.0),
        )
    )
    (found,) = model.predict(images, [sample], rescale=True)
    found = found.pred_instances
    outputs = dict(boxes=found.bboxes, scores=found.scores, labels=found.labels)
    if "masks" in found:
        outputs["masks"] = found.masks
    return outputs
