"""Inference in lower precision: which layers compute in it, and what stays float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.deploy.int8 import QuantizedLinear, has_int8, quantize_linear_layers
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.verbs import castling_modules

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
"""The names of precisions: floating point of 32 and 16 bits, and 8-bit integers."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def check_precision(precision: str, device: torch.device | str = "cpu") -> None:
    """Check that a precision is known and that a device computes in it.

    Args:
        precision: One of :data:`PRECISIONS`.
        device: Where the model runs. Defaults to ``'cpu'``.

    Raises:
        ValueError: If the precision is not known.
        RuntimeError: If the device emulates it or does not have it.
    """
    if precision not in PRECISIONS:
        raise OptionError(
            f"precision {precision!r} is not known: choose one of {list(PRECISIONS)}"
        )
    device = torch.device(device)
    if precision in _DTYPES and not _computes_in(_DTYPES[precision], device):
        others = [p for p in _DTYPES if p != precision]
        others = [p for p in others if _computes_in(_DTYPES[p], device)]
        raise UnavailableError(
            f"precision {precision}: this {device.type} has no instructions for "
            f"{_DTYPES[precision]} and would be slower with it than in float32: "
            f"choose one of {['fp32', *others]}, or another machine"
        )
    if precision == "int8" and not (device.type == "cpu" and has_int8()):
        raise UnavailableError(
            f"precision int8 is for CPUs, by oneDNN's operators in torch, and this "
            f"{device.type} or build of torch has none: choose fp32, bf16 or fp16"
        )


def set_precision(model: nn.Module, precision: str) -> None:
    """Let the layers of a deployed model compute in a lower precision, in place.

    Weights of linear layers and convolutions are rounded once, and inputs as they
    arrive. The backbone passes what they return on as it is; layers outside it (neck,
    heads) return float32, so that boxes are decoded and suppressed in it. Norms keep
    float32 weights and statistics, attention normalizes and sums over tokens in
    float32, and the sum of residuals stays float32.

    ``'int8'`` quantizes the linear layers of the backbone only, see
    :class:`~mmcastling.deploy.int8.QuantizedLinear`; convolutions and what lies outside
    the backbone stay float32.

    Args:
        model: A deployed detector, segmentor, classifier, or backbone, in evaluation.
        precision: One of :data:`PRECISIONS`; ``'fp32'`` changes nothing.

    Raises:
        ValueError: If the precision is not known, the model still has an auxiliary
            branch, or it is in a lower precision already.
        RuntimeError: If the machine does not support it.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    check_precision(precision, device)
    if precision == "fp32":
        return
    if name := next((name for name, _ in castling_modules(model)), None):
        raise OptionError(
            f"precision {precision} is for deployed models, and {name or 'the model'} "
            "still has its auxiliary branch: prune it with "
            "mmcastling.switch_to_deploy(model), or leave --no-deploy out"
        )
    if lowered := _precisions(model) - {"fp32"}:
        raise OptionError(
            f"precision {precision}: the model's layers compute in {min(lowered)} "
            "already; load it in float32 again"
        )
    backbone = getattr(model, "backbone", model)
    if precision == "int8":
        quantize_linear_layers(backbone)
        return
    dtype = _DTYPES[precision]
    inside = set(backbone.modules())
    for module in model.modules():
        if isinstance(module, _LAYERS):
            _lower(module, dtype, cast_back=module not in inside)
    backbone.register_forward_hook(_float32_output)


def _precisions(model: nn.Module) -> set[str]:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    layers = [m for m in model.modules() if isinstance(m, _LAYERS)]
    found = {names.get(layer.weight.dtype, "fp32") for layer in layers}
    if any(isinstance(m, QuantizedLinear) for m in model.modules()):
        found.add("int8")
    return found


def _lower(layer: nn.Module, dtype: torch.dtype, cast_back: bool) -> None:
    def cast(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in inputs)

    layer.to(dtype)
    layer.register_forward_pre_hook(cast)
    if cast_back:
        layer.register_forward_hook(_float32_output)


def _float32_output(_: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, (list, tuple)):
        return type(output)(_float32_output(_, inputs, item) for item in output)
    if isinstance(output, Tensor) and output.is_floating_point():
        return output.float()
    return output


def _computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for it, and does not emulate them."""
    if device.type == "cuda":
        return dtype is torch.float16 or torch.cuda.is_bf16_supported(False)
    if device.type == "cpu":
        kind = "bf16" if dtype is torch.bfloat16 else "fp16"
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")())
    return True
