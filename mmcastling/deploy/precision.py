"""Inference in lower precision: which layers compute in it, and what stays float32."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import logging
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmcastling.analysis.machine import instruction_set
from mmcastling.castle.swap import softmax_attentions
from mmcastling.deploy.half import halve_linear
from mmcastling.deploy.int8 import (
    QuantizedLinear,
    has_int8,
    is_plain_linear,
    quantize_in_place,
)
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.verbs import castling_modules

logger = logging.getLogger("mmcastling")

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
    if precision in _DTYPES and not computes_in(_DTYPES[precision], device):
        others = [p for p in _DTYPES if p != precision]
        others = [p for p in others if computes_in(_DTYPES[p], device)]
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


def gains_nothing(precision: str, device: torch.device | str = "cpu") -> str | None:
    """Why a precision that a device computes in is no faster than float32 there.

    Known from the instructions of x86 alone. oneDNN computes in bfloat16 and float16
    on all CPUs with AVX-512, and on those that lack products of them it multiplies in
    float32.

    Returns:
        What was found, or None where it may gain.
    """
    wanted = {
        "bf16": ("amx_bf16", "avx512_bf16", "avx_ne_convert", "avx10_2"),
        "fp16": ("amx_fp16", "avx10_2"),
    }
    found = torch.cpu.get_capabilities()
    x86 = found.get("architecture") == "x86_64"
    if torch.device(device).type != "cpu" or precision not in wanted or not x86:
        return None
    if any(found.get(name) for name in wanted[precision]):
        return None
    return (
        f"this CPU ({instruction_set().upper()}) multiplies it as float32, it has "
        f"none of {', '.join(wanted[precision])}"
    )


def may_gain(precision: str, device: torch.device | str = "cpu") -> bool:
    """Whether a device has instructions for bf16 or fp16 that may pay."""
    device = torch.device(device)
    known = computes_in(_DTYPES[precision], device)
    return known and gains_nothing(precision, device) is None


def check_lowerable(model: nn.Module, precision: str) -> None:
    """Raise an OptionError unless a model is deployed, and all of it in float32."""
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


def set_precision(model: nn.Module, precision: str) -> None:
    """Let the layers of a deployed model compute in a lower precision, in place.

    Weights of linear layers and convolutions are rounded once, those of linear layers
    laid out for oneDNN once, and inputs are rounded as they arrive. The backbone passes
    what they return on as it is; layers outside it (neck, heads) return float32, so
    that boxes are decoded and suppressed in it, and so do all layers if some attention
    was not castled, which may add a bias. Norms keep float32 weights and statistics,
    attention normalizes and sums over tokens in float32, and the sum of residuals stays
    float32. A warning says where the processor's instructions rule a gain out.

    ``'int8'`` quantizes the linear layers of the backbone, see
    :class:`~mmcastling.deploy.int8.QuantizedLinear`; its convolutions stay float32.
    What lies outside the backbone is in bfloat16 where the processor's instructions
    may gain by it, and in float32 elsewhere.

    Layers whose weights another module reads past them, as softmax attention in torch
    and in BEiT does, stay float32 as well, and so do layers that are not plainly linear
    in ``'int8'``; a warning names them. The model can be copied and pickled; its state
    dict fits another one in the same precision, and one in float32 fits it.

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
    check_lowerable(model, precision)
    if why := gains_nothing(precision, device):
        logger.warning(
            "precision %s gains nothing on this machine: %s. --precision auto measures "
            "what does",
            *(precision, why),
        )
    backbone = getattr(model, "backbone", model)
    inside = set(backbone.modules())
    holders = _read_past(model)
    read = {layer for layers in holders.values() for layer in layers}
    if precision == "int8":
        linear = _named_layers(backbone, nn.Linear)
        stay = {m for m in linear if m in read or not is_plain_linear(m)}
        _say_what_stays(precision, linear, stay)
        quantize_in_place(m for m in linear if m not in stay)
        if may_gain("bf16", device):
            layers = _named_layers(model, _LAYERS)
            outside = {m: name for m, name in layers.items() if m not in inside}
            _say_what_stays(precision, outside, read & set(outside))
            _halve([m for m in outside if m not in read], torch.bfloat16)
        return
    layers = _named_layers(model, _LAYERS)
    stay = read & set(layers)
    _say_what_stays(precision, layers, stay)
    for holder in holders:
        holder.register_forward_pre_hook(_float32_input, with_kwargs=True)
    if softmax_attentions(backbone):  # which may add float32 biases
        inside = set()
    lowered = [m for m in layers if m not in stay]
    _halve(lowered, _DTYPES[precision], inside)
    backbone.register_forward_hook(_float32_output)


def _named_layers(
    model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]
) -> dict[nn.Module, str]:
    return {m: name for name, m in model.named_modules() if isinstance(m, kinds)}


def _say_what_stays(
    precision: str, layers: dict[nn.Module, str], stay: set[nn.Module]
) -> None:
    if stay:
        logger.warning(
            "precision %s: %d of %d layers stay float32, since their weights are not "
            "used as in a plain layer: %s",
            *(precision, len(stay), len(layers)),
            ", ".join(name for m, name in layers.items() if m in stay),
        )


def _halve(
    layers: Iterable[nn.Module],
    dtype: torch.dtype,
    passed_on: Collection[nn.Module] = (),
) -> None:
    """Round weights, inputs, and the outputs of layers that are passed on."""
    for layer in layers:
        if not halve_linear(layer, dtype):
            layer.to(dtype)
            layer.register_forward_pre_hook(_own_dtype_input, with_kwargs=True)
        if layer not in passed_on:
            layer.register_forward_hook(_float32_output)


def _precisions(model: nn.Module) -> set[str]:
    names = {dtype: name for name, dtype in _DTYPES.items()}
    layers = [m for m in model.modules() if isinstance(m, _LAYERS)]
    found = {names.get(layer.weight.dtype, "fp32") for layer in layers}
    if any(isinstance(m, QuantizedLinear) for m in model.modules()):
        found.add("int8")
    return found


# Hooks are functions of this module, so that a model that has them can be pickled.


def _own_dtype_input(layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast((args, kwargs), layer.weight.dtype)


def _float32_input(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast((args, kwargs), torch.float32)


def _float32_output(_: nn.Module, inputs: Any, output: Any) -> Any:
    return _cast(output, torch.float32)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors in tuples, named or not, lists and dicts."""
    return tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value
    )


def _read_past(model: nn.Module) -> dict[nn.Module, set[nn.Module]]:
    """Modules whose ``forward`` reads weights of layers that they hold, and those."""
    found: dict[nn.Module, set[nn.Module]] = {}
    for module in model.modules():
        for path in _weights_read_by(type(module)):
            with contextlib.suppress(AttributeError):  # of another setting
                layer = operator.attrgetter(path)(module)
                if isinstance(layer, _LAYERS):
                    found.setdefault(module, set()).add(layer)
    return found


@functools.cache
def _weights_read_by(cls: type[nn.Module]) -> list[str]:
    """``qkv``, if ``forward`` or what it calls has ``self.qkv.weight``."""
    paths: list[str] = []
    seen, todo = set(), [cls.forward]
    while todo:
        code = getattr(inspect.unwrap(todo.pop()), "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        inner = [code, *(c for c in code.co_consts if inspect.iscode(c))]
        for step in (step for c in inner for step in dis.get_instructions(c)):
            if step.opname in ("LOAD_FAST", "LOAD_DEREF"):
                path = [] if step.argval == "self" else None
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and path is not None:
                if step.argval == "weight" and path:
                    paths.append(".".join(path))
                path = [*path, step.argval]
                if len(path) == 1 and inspect.isroutine(getattr(cls, path[0], None)):
                    todo.append(getattr(cls, path[0]))
            else:
                path = None
    return paths


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for a dtype, and does not emulate them."""
    if device.type == "cuda":
        return dtype is torch.float16 or torch.cuda.is_bf16_supported(False)
    if device.type == "cpu":
        kind = "bf16" if dtype is torch.bfloat16 else "fp16"
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")())
    return True
