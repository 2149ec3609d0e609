"""Linear layers on 8-bit integers, by the oneDNN operators that torch has for CPUs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import Name, onednn_name
from mmcastling.attention.recording import register_flops

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

    A row that is not finite gives a row of NaN and leaves the others alone.

    Args:
        linear: The layer in float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.input_levels = 254 if torch.cpu._is_vnni_supported() else 127
        weight, steps = _rounded(linear.weight)
        self.register_buffer("weight_int8", weight)
        self.register_buffer("weight_steps", steps)
        bias = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._pack()
        self.train(linear.training)

    def _pack(self) -> None:
        """Lay the weight out for oneDNN, as a tensor that can be neither copied nor
        saved."""
        self._packed = torch.ops.onednn.qlinear_prepack(self.weight_int8, None)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Load what such a layer has saved, or the weight of one in floating point."""
        if (weight := state_dict.pop(f"{prefix}weight", None)) is not None:
            names = (f"{prefix}weight_int8", f"{prefix}weight_steps")
            state_dict.update(zip(names, _rounded(weight), strict=True))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._pack()

    def forward(self, input: Tensor) -> Tensor:
        """Apply to ``(..., in_features)`` in float32; the name is ``nn.Linear``'s."""
        return self.then(nn.Identity(), input)

    def then(self, activation: nn.Module, x: Tensor) -> Tensor:
        """``activation(layer(x))``, in one pass; see
        :func:`~mmcastling.attention.fast.apply_then`."""
        name = onednn_name(activation)
        if name is None:
            return activation(self(x))
        if x.shape[0] == 0:  # no images
            return x.new_zeros((*x.shape[:-1], self.out_features))
        low, high = torch.aminmax(x)
        compiling = torch.compiler.is_compiling()
        if compiling or not (low.isfinite() and high.isfinite()):
            bad = ~x.isfinite().all(-1, keepdim=True)
            x = x.masked_fill(bad, 0.0)
            y = self._compute(x, *torch.aminmax(x), name)
            return y.masked_fill(bad, torch.nan)
        return self._compute(x, low, high, name)

    def _compute(self, x: Tensor, low: Tensor, high: Tensor, name: Name) -> Tensor:
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
            factor = factor.item()
            for part, target in zip(*rows, strict=True):
                # By way of int32: torch converts to bytes one number at a time.
                scaled = torch.add(shift, part, alpha=factor)
                target.copy_(scaled.to(torch.int32))
        return torch.ops.onednn.qlinear_pointwise(
            *(rounded, step, zero.to(torch.int32)),
            *(self._packed, self.weight_steps, self._zeros, self.bias),
            *(1.0, 0, torch.float32),  # what comes out is not rounded
            *name,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, input_levels={self.input_levels}"
        )


def _flops(x: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * math.prod(x) * out_shape[-1]


if has_int8():
    register_flops(torch.ops.onednn.qlinear_pointwise, _flops)


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as 8-bit integers, and the step of each output channel."""
    weight = weight.detach().float()
    steps = (weight.abs().amax(dim=1) / _WEIGHT_LEVELS).clamp_min(_SMALLEST_STEP)
    return (weight / steps[:, None]).round().to(torch.int8), steps


@torch.no_grad()
def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer has a weight of its own and computes what a linear layer does."""
    if not isinstance(layer, nn.Linear) or layer._parameters.get("weight") is None:
        return False
    x = torch.linspace(-1.0, 1.0, 2 * layer.in_features).to(layer.weight)
    x = x.unflatten(0, (2, -1))
    y = nn.functional.linear(x, layer.weight, layer.bias)
    return torch.allclose(layer.forward(x), y, rtol=1e-3, atol=1e-5)


def quantize_in_place(layers: Iterable[nn.Linear]) -> None:
    """Make each layer a :class:`QuantizedLinear`: hooks and references to it hold."""
    for layer, new in [(layer, QuantizedLinear(layer)) for layer in layers]:
        hooks = {name: v for name, v in vars(layer).items() if "hook" in name}
        layer.__dict__ = {**vars(new), **hooks}
        layer.__class__ = QuantizedLinear
