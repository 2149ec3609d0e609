"""Automatic mixed precision on every device whose autocast torch offers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from mmcastling.compat.sharded import WholeNormClipping
from mmcastling.deploy import computes_in
from mmcastling.errors import OptionError
from mmcastling.registry import OPTIM_WRAPPERS

logger = logging.getLogger("mmcastling")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@OPTIM_WRAPPERS.register_module()
class DeviceAmpOptimWrapper(WholeNormClipping, AmpOptimWrapper):
    """MMEngine's ``AmpOptimWrapper``, which demands an accelerator, for CPUs too.

    The loss is scaled in float16 only, whose gradients underflow; bfloat16 has the
    exponents of float32, so that a step is never left out for an overflow.

    Args:
        dtype: ``'float16'``, ``'bfloat16'``, or None for float16 on CUDA and bfloat16
            on a CPU. Defaults to None.
        loss_scale: ``'dynamic'``, a fixed scale, or a dict with arguments of
            :class:`torch.amp.GradScaler`. Defaults to ``'dynamic'``.
        use_fsdp: Scale for parameters sharded by ``FullyShardedDataParallel``.
            Defaults to False.
        **kwargs: Arguments of MMEngine's ``OptimWrapper``, such as ``clip_grad`` and
            ``accumulative_counts``.

    Raises:
        OptionError: If the dtype or the scale is not known, or torch has no autocast
            on the device.
    """

    def __init__(
        self,
        dtype: str | torch.dtype | None = None,
        loss_scale: str | float | dict[str, Any] = "dynamic",
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        OptimWrapper.__init__(self, **kwargs)  # the parent's demands an accelerator
        self.device_type = get_device()
        if not torch.amp.is_autocast_available(self.device_type):
            raise OptionError(
                f"torch has no automatic mixed precision on {self.device_type!r}: "
                "train without"
            )
        if dtype is None:
            dtype = torch.get_autocast_dtype(self.device_type)
        self.cast_dtype = DTYPES.get(dtype, dtype)
        if self.cast_dtype not in DTYPES.values():
            raise OptionError(
                f"dtype {dtype!r} is not a half precision: choose one of {list(DTYPES)}"
            )
        if not computes_in(self.cast_dtype, torch.device(self.device_type)):
            logger.warning(
                "automatic mixed precision in %s: this %s has no instructions for it "
                "and emulates them, which may take 30 times as long as float32. Choose "
                "another of %s, or train without",
                *(self.cast_dtype, self.device_type, list(DTYPES)),
            )
        self._scale_update_param = None
        options: dict[str, Any] = {}
        if isinstance(loss_scale, dict):
            options = dict(loss_scale)
        elif isinstance(loss_scale, (int, float)):
            self._scale_update_param = float(loss_scale)
            options["init_scale"] = float(loss_scale)
        elif loss_scale != "dynamic":
            raise OptionError(
                f"loss_scale {loss_scale!r} must be 'dynamic', a number, or a dict "
                "with arguments of torch.amp.GradScaler"
            )
        options.setdefault("enabled", self.cast_dtype == torch.float16)
        scaler = ShardedGradScaler if use_fsdp else torch.amp.GradScaler
        self.loss_scaler = scaler(device=self.device_type, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the optimizer and of the loss' scale.

        A run in bfloat16 has no scale, so that float16 resumed from it starts anew.
        """
        if not state_dict.get("loss_scaler"):
            state_dict.pop("loss_scaler", None)
        super().load_state_dict(state_dict)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and hold back gradient synchronisation while accumulating."""
        self.remember(model)
        cast = torch.autocast(self.device_type, dtype=self.cast_dtype)
        with OptimWrapper.optim_context(self, model), cast:
            yield
