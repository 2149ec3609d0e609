"""Linear layers, and what deployment makes of them and of what stands behind them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from mmcastling.attention.functional import is_recorded


class LayerScale(nn.Module):
    """A learned factor per channel, named as mmpretrain names it.

    Args:
        embed_dims: Channels ``C`` of the last axis.
        init_value: Initial factor.
    """

    def __init__(self, embed_dims: int, init_value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((embed_dims,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@torch.no_grad()
def fold_layer_scale(linear: nn.Linear, scale: nn.Module) -> nn.Module:
    """Multiply a linear layer by the learned factors behind it, in place.

    Args:
        linear: The layer.
        scale: What follows it: a module with a ``weight`` of factors per channel, or
            ``nn.Identity``.

    Returns:
        What is left to follow the layer, ``nn.Identity()``.
    """
    factor = getattr(scale, "weight", None)
    if factor is not None:
        linear.weight.mul_(factor[:, None])
        if linear.bias is not None:
            linear.bias.mul_(factor)
    return nn.Identity()


class FusedLinear(nn.Linear):
    """A linear layer of a deployed model, and the activation behind it.

    On a CPU, oneDNN adds the bias and applies the activation to what is still in the
    cache, where torch's own layer passes over memory once more for each. Wherever
    oneDNN does not serve (gradients, autocast, other devices, and graphs that are
    being compiled, traced or exported) it is the layer and then the activation. The
    parameters, and their names, are those of ``nn.Linear``.

    Made by :func:`fuse_linear` out of a layer that exists.

    Attributes:
        activation: The activation, ``nn.Identity()`` for none.
    """

    activation: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(..., in_features)``."""
        if onednn_serves(x, self.weight, self.bias):
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, *onednn_name(self.activation)
            )
        return self.activation(super().forward(x))


def onednn_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's fused layers compute with such tensors, here and now.

    Args:
        x: Input of a layer.
        weight: Its weight.
        bias: Its bias, if it has one.
    """
    return (
        not is_recorded(x, weight, bias)
        and x.device.type == "cpu"
        and x.numel() > 0
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and _onednn_computes_in(x.dtype)
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def fuse_linear(layer: nn.Module, activation: nn.Module | None = None) -> nn.Module:
    """Make a linear layer a :class:`FusedLinear`, in place. Idempotent.

    Args:
        layer: The layer; its class changes, so that hooks and references to it hold.
            What is not exactly an ``nn.Linear`` stays as it is.
        activation: What follows it. Defaults to None.

    Returns:
        What is left to follow it: ``nn.Identity()``, or an activation that the layer
        did not take over.
    """
    if type(layer) is nn.Linear:
        layer.__class__ = FusedLinear
        layer.activation = nn.Identity()
    if activation is None:
        return nn.Identity()
    if not isinstance(layer, FusedLinear) or onednn_name(activation) is None:
        return activation
    if not isinstance(activation, nn.Identity):
        layer.activation = activation
    return nn.Identity()


def onednn_name(activation: nn.Module) -> tuple[str, list[float], str] | None:
    """oneDNN's name of an activation behind a layer, None for one it does not know.

    Returns:
        Name, parameters and variant, as torch's operators of oneDNN take them.
    """
    if type(activation) is nn.GELU:
        return "gelu", [], activation.approximate
    names = {nn.Identity: "none", nn.ReLU: "relu", nn.Hardswish: "hardswish"}
    name = names.get(type(activation))
    return None if name is None else (name, [], "")


@functools.cache
def _onednn_computes_in(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
