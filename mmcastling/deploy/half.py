"""Linear layers in 16-bit floating point, whose weights are rounded and packed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.attention.fast import onednn_name, onednn_serves

_NOTHING = nn.Identity()


class HalfLinear(nn.Linear):
    """A linear layer in bfloat16 or float16, for inference.

    It rounds inputs that arrive in another format, and what it returns stays in its
    own, for the next layer. Where oneDNN serves, its weight is laid out for oneDNN
    once, and again when it has changed. Made by :func:`halve_linear`.
    """

    _packed: tuple[Any, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Apply to ``(..., in_features)``; the name is ``nn.Linear``'s."""
        return self.then(_NOTHING, input)

    def then(self, activation: nn.Module, x: Tensor) -> Tensor:
        """``activation(layer(x))``, in one pass where oneDNN serves."""
        x, weight = x.to(self.weight.dtype), self.weight
        name = onednn_name(activation)
        if name is None or not onednn_serves(x, weight, self.bias):
            return activation(nn.functional.linear(x, weight, self.bias))
        if not weight.is_inference():  # whose changes torch does not count
            weight = self._pack(x.numel() // self.in_features)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, *name)

    def _pack(self, rows: int) -> Tensor:
        state = (self.weight.data_ptr(), self.weight._version)
        if self._packed is None or self._packed[0] != state:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
            self._packed = (state, packed)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_packed"}


def halve_linear(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Make a linear layer a :class:`HalfLinear` of a dtype, in place.

    Returns:
        Whether it is one now: what is not plainly torch's linear layer, with a weight
        of its own, stays as it is.
    """
    plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    if not plain or layer._parameters.get("weight") is None:
        return False
    layer.to(dtype)
    layer.__class__ = HalfLinear
    return True
