"""What deployment makes of layers: norms and factors folded in, activations fused."""

from __future__ import annotations

from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import FFN
from mmcv.cnn.bricks.wrappers import Linear as MMCVLinear
from mmpretrain.models.backbones.levit import ConvolutionBatchNorm, LinearBatchNorm
from torch import nn

from mmcastling.attention.fast import fold_layer_scale, fuse_linear
from mmcastling.models.conv_ffn import ConvLeViTMLP, ConvMViTMLP

_WITHOUT_EFFECT = (nn.Dropout, DropPath)
_WITH_BATCH_NORM = (ConvolutionBatchNorm, LinearBatchNorm)


def fold_for_inference(module: nn.Module) -> None:
    """Fold what stands behind a layer into it, in place.

    Batch norms (with the statistics that training has gathered) go into the linear
    layer or convolution in front of them, LayerScale factors into the last layer of
    their MLP; dropout and stochastic depth become ``nn.Identity``. Linear layers become
    :class:`~mmcastling.attention.fast.FusedLinear`, those of an MLP together with the
    activation that follows. Inference stays the same up to rounding, names of
    parameters change. Idempotent.
    """
    for name, child in module.named_children():
        if isinstance(child, _WITHOUT_EFFECT):
            setattr(module, name, nn.Identity())
        elif isinstance(child, _WITH_BATCH_NORM):
            setattr(module, name, child.fuse())
        else:
            fold_for_inference(child)
    if isinstance(module, FFN) and not isinstance(module.gamma2, nn.Identity):
        *_, last = (layer for layer in module.layers if isinstance(layer, nn.Linear))
        module.gamma2 = fold_layer_scale(last, module.gamma2)
    for child in module.children():
        if type(child) is MMCVLinear:  # a wrapper for versions of torch long past
            child.__class__ = nn.Linear
        fuse_linear(child)
    _fuse_activation(module)


def _fuse_activation(module: nn.Module) -> None:
    """Let what stands before the activation of an MLP apply it, in place."""
    if isinstance(module, ConvMViTMLP):
        module.act = _fuse(module, module.fc1, module.act)
    elif isinstance(module, ConvLeViTMLP):
        module.activation = _fuse(module, module.linear1, module.activation)
    elif isinstance(module, FFN):
        for part in module.layers:
            if isinstance(part, nn.Sequential):  # a layer, its activation, dropout
                part[1] = _fuse(module, part[0], part[1])


def _fuse(mlp: nn.Module, layer: nn.Linear, activation: nn.Module) -> nn.Module:
    if not hasattr(mlp, "dwconv"):
        return fuse_linear(layer, activation)
    if not isinstance(activation, nn.Identity):
        mlp.dwconv.activation = activation
    return nn.Identity()
