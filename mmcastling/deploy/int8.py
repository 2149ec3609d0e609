"""Linear layers on 8-bit integers, by the oneDNN operators that torch has for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import onednn_name

_WEIGHT_LEVELS = 127  # of a signed weight, symmetric
_SMALLEST_STEP = 1e-12  # of a tensor of zeros
_ROWS = 256  # rounded at a time, so that the steps between stay in the cache


def has_int8() -> bool:
    """Whether this build of torch has oneDNN, whose 8-bit operators are used."""
    return torch.backends.mkldnn.is_available()


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are 8-bit integers, for inference on a CPU.

    Weights have a step per output channel and are rounded once. Inputs have one step
    per call and are rounded as they arrive, to 8 bits where the CPU has integer dot
    products (VNNI) and to 7 where it adds pairs of products in 16 bits, which 8 would
    overflow. Sums are exact, outputs float32.

    Args:
        linear: The layer in float32, whose activation it takes over if that is a
            :class:`~mmcastling.attention.fast.FusedLinear`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.activation = getattr(linear, "activation", nn.Identity())
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.input_levels = 254 if torch.cpu._is_vnni_supported() else 127
        weight = linear.weight.detach().float()
        steps = (weight.abs().amax(dim=1) / _WEIGHT_LEVELS).clamp_min(_SMALLEST_STEP)
        rounded = (weight / steps[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._steps = steps
        self._zeros = torch.zeros(len(steps), dtype=torch.int32)
        self._bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(..., in_features)`` in float32."""
        if x.shape[0] == 0:  # no images
            return x.new_zeros((*x.shape[:-1], self.out_features))
        low, high = torch.aminmax(x)
        low = low.clamp_max(0.0)  # so that zero is a level: padding stays exact
        step = ((high.clamp_min(0.0) - low) / self.input_levels).clamp_min(
            _SMALLEST_STEP
        )
        zero = (-low / step).round()
        # The conversion cuts decimals off: with 1/2 added that is rounding.
        shift, factor = zero + 0.5, 1.0 / step
        if torch.compiler.is_compiling():  # which fuses it, and knows no loop
            rounded = torch.addcmul(shift, x, factor).to(torch.uint8)
        else:
            rounded = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
            rows = (t.reshape(-1, self.in_features).split(_ROWS) for t in (x, rounded))
            for part, target in zip(*rows, strict=True):
                target.copy_(torch.addcmul(shift, part, factor))
        return torch.ops.onednn.qlinear_pointwise(
            *(rounded, step, zero.to(torch.int32)),
            *(self._weight, self._steps, self._zeros, self._bias),
            *(1.0, 0, torch.float32),  # what comes out is not rounded
            *onednn_name(self.activation),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, input_levels={self.input_levels}"
        )


def quantize_linear_layers(module: nn.Module) -> None:
    """Put a :class:`QuantizedLinear` in the place of every linear layer below."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantizedLinear(child))
        else:
            quantize_linear_layers(child)
