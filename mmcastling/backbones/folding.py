"""What deployment removes by algebra: norms and factors behind a layer, dropout."""

from __future__ import annotations

from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import FFN
from mmpretrain.models.backbones.levit import ConvolutionBatchNorm, LinearBatchNorm
from torch import nn

from mmcastling.attention.block import fold_layer_scale

_WITHOUT_EFFECT = (nn.Dropout, DropPath)
_WITH_BATCH_NORM = (ConvolutionBatchNorm, LinearBatchNorm)


def fold_for_inference(module: nn.Module) -> None:
    """Fold what stands behind a layer into it, in place; inference stays the same.

    Batch norms (with the statistics that training has gathered) go into the linear
    layer or convolution in front of them, LayerScale factors into the last layer of
    their MLP; dropout and stochastic depth become ``nn.Identity``. Names of parameters
    change. Idempotent.

    Args:
        module: What holds the layers, at any depth.
    """
    for name, child in module.named_children():
        if isinstance(child, _WITHOUT_EFFECT):
            setattr(module, name, nn.Identity())
        elif isinstance(child, _WITH_BATCH_NORM):
            setattr(module, name, child.fuse())
        else:
            fold_for_inference(child)
    if isinstance(module, FFN):
        *_, last = (layer for layer in module.layers if isinstance(layer, nn.Linear))
        module.gamma2 = fold_layer_scale(last, module.gamma2)
