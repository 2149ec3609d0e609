"""What deployment makes of layers: norms and factors folded in, activations fused."""

from __future__ import annotations

import copy
from typing import Any

from mmcv.cnn.bricks import Dropout, DropPath
from mmcv.cnn.bricks.scale import LayerScale as MMCVLayerScale
from mmcv.cnn.bricks.transformer import FFN
from mmcv.cnn.bricks.wrappers import Linear as MMCVLinear
from mmengine.model import Sequential
from mmpretrain.models.backbones.levit import ConvolutionBatchNorm, LinearBatchNorm
from mmpretrain.models.heads.levit_head import BatchNormLinear
from mmpretrain.models.utils import LayerScale, SwiGLUFFN, SwiGLUFFNFused
from torch import Tensor, nn

from mmcastling.attention.deploying import (
    fold_layer_scale,
    note,
    why_not_plain,
    without_effect,
)
from mmcastling.attention.fast import apply_layer, apply_then, fused_inside
from mmcastling.models.conv_ffn import ConvFFN

_WITHOUT_EFFECT = (nn.Dropout, Dropout, DropPath)
_WITH_BATCH_NORM = (ConvolutionBatchNorm, LinearBatchNorm, BatchNormLinear)
_ACTIVATIONS = (nn.GELU, nn.Hardswish)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class FusedSequential(Sequential):
    """Layers and activations one by one or, where it can, an activation with the layer
    before it; see :func:`~mmcastling.attention.fast.apply_then`."""

    def forward(self, x: Tensor) -> Tensor:
        modules = [*self]
        while modules:
            layer, *modules = modules
            if modules and isinstance(modules[0], _ACTIVATIONS):
                activation, *modules = modules
                x = apply_then(layer, activation, x)
            else:
                x = apply_layer(layer, x)
        return x


class FusedSwiGLU(SwiGLUFFN):
    """mmpretrain's MLP with gates, its linear layers in one pass each."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with fused_inside(self):
            return super().forward(*args, **kwargs)


_CLASSES = {
    MMCVLinear: nn.Linear,  # mmcv's wraps torch's for versions long past
    SwiGLUFFN: FusedSwiGLU,
    SwiGLUFFNFused: FusedSwiGLU,
}


def fold_for_inference(module: nn.Module) -> None:
    """Fold what stands behind a layer into it, in place.

    Batch norms (with the statistics that training has gathered) go into the linear
    layer or convolution beside them, LayerScale factors into the last layer of their
    MLP; dropout and stochastic depth become ``nn.Identity``. Linear layers of mmcv
    become torch's own, which MLPs compute together with the activation that follows.
    Inference stays the same up to rounding, names of parameters change. What is not
    exactly as it was built (wrapped, hooked, pruned) stays as it is, with a note in the
    log. Idempotent.
    """
    for name, child in module.named_children():
        for old, new in _CLASSES.items():
            _change_class(child, old, new)
        if isinstance(child, _WITHOUT_EFFECT):
            setattr(module, name, without_effect(child, *_WITHOUT_EFFECT))
        elif isinstance(child, _WITH_BATCH_NORM):
            setattr(module, name, _without_norm(child))
        else:
            fold_for_inference(child)
    if isinstance(module, FFN):
        _fold_mlp(module)


def _without_norm(pair: nn.Module) -> nn.Module:
    """The layer of a pair of layer and batch norm, or the pair where that is more."""
    reasons = [why_not_plain(pair, *_WITH_BATCH_NORM)]
    for part in pair.children():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            reasons.append(why_not_plain(part, *_BATCH_NORMS))
            if part.running_mean is None or part.weight is None:
                reasons.append("the batch norm has no statistics or factors of its own")
        else:
            reasons.append(why_not_plain(part, nn.Linear, nn.Conv2d))
    for reason in filter(None, reasons):
        note(pair, f"not folded into one layer: {reason}")
        return pair
    layer = copy.deepcopy(pair).fuse()  # which changes the layer in place
    return layer.requires_grad_(any(p.requires_grad for p in pair.parameters()))


def _fold_mlp(mlp: FFN) -> None:
    layers = mlp.layers
    # What stands between a layer and its factors, and is called as it was built.
    usual = type(mlp).forward in (FFN.forward, ConvFFN.forward)
    if not usual or why_not_plain(layers, Sequential) or len(layers) < 2:
        if not isinstance(mlp.gamma2, nn.Identity):
            note(mlp, "its layer scale is not folded: the MLP is not as it was built")
        return
    layers[-2], mlp.gamma2 = fold_layer_scale(
        layers[-2],
        mlp.gamma2,
        kinds=[LayerScale, MMCVLayerScale],
        between=[layers[-1]],
    )
    for part in (layers, *layers):
        _change_class(part, Sequential, FusedSequential)


def _change_class(
    module: nn.Module, old: type[nn.Module], new: type[nn.Module]
) -> None:
    """Make a module of exactly ``old`` one of ``new``, unless its forward is patched.

    A patch usually calls the forward that it has replaced, of the old class.
    """
    if type(module) is old and "forward" not in vars(module):
        module.__class__ = new
