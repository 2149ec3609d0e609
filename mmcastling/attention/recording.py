"""Whether operations on tensors are looked at one by one, by torch or by a tool.

Shortcuts (fused layers, results written in place) hold only where they are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.flop_counter import flop_registry, register_flop_formula

_PLAIN = (Tensor, nn.Parameter)


def is_tracing_or_needs_grad(*tensors: Tensor | None) -> bool:
    """Whether operations on tensors become a graph, or are seen by anything else.

    By gradients of reverse or forward mode, the compiler and the exporters, ``vmap``
    and its kin, modes that see each operation (counters, fake tensors), and classes of
    tensors that do so themselves.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return True
    if torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext)  # of torch.set_default_device: sees none
        for mode in _get_current_function_mode_stack()
    ):
        return True
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or (grad and tensor.requires_grad):
            return True
    return False


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of ``torch.func`` is on."""
    if torch.compiler.is_compiling():
        return False
    level = torch._C._functorch.peek_interpreter_stack()
    return forward_ad._current_level >= 0 or level is not None


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or a patch."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    watched = any(hooks) or "forward" in vars(module)
    return bool(watched or torch_module._has_any_global_hook())


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Let torch's ``FlopCounterMode`` count an operator, by the shapes it is given."""
    if operator not in flop_registry:
        register_flop_formula(operator)(formula)
