"""Training with sharded parameters (FSDP): what MMEngine's strategy gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine._strategy import FSDPStrategy
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper, OptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from mmcastling.registry import OPTIM_WRAPPERS, STRATEGIES


class WholeNormClipping:
    """Clips by the norm over all shards, mixed into an optimizer wrapper.

    Each process of ``FullyShardedDataParallel`` holds a part of every gradient.
    MMEngine clips by the norm of that part, by another factor in each; this asks the
    sharded model, which knows the whole.
    """

    _sharded: FullyShardedDataParallel | None = None

    def remember(self, model: nn.Module) -> None:
        """Note the model whose gradients will be clipped."""
        is_sharded = isinstance(model, FullyShardedDataParallel)
        self._sharded = model if is_sharded else None

    def _clip_grad(self) -> None:
        if self._sharded is None or self.clip_func is not clip_grad_norm_:
            super()._clip_grad()
            return
        options = self.clip_grad_kwargs
        norm = self._sharded.clip_grad_norm_(
            options["max_norm"], options.get("norm_type", 2.0)
        )
        self.message_hub.update_scalar(f"train/{self.grad_name}", float(norm))


@OPTIM_WRAPPERS.register_module()
class ShardedOptimWrapper(WholeNormClipping, OptimWrapper):
    """MMEngine's ``OptimWrapper`` that clips by the norm over all of FSDP's shards."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Hold back gradient synchronisation while accumulating."""
        self.remember(model)
        with super().optim_context(model):
            yield


@STRATEGIES.register_module()
class ResumableFSDPStrategy(FSDPStrategy):
    """MMEngine's ``FSDPStrategy``, with its optimizer's groups and states put right.

    Sharded parameters are flat, so that MMEngine takes ``flat_decay_mult`` for all of
    them: here the groups are made while the parameters are whole. MMEngine loads states
    with torch's arguments in an order that torch has given up. And on a CPU torch
    gathers states wrongly where they are offloaded to where they are.
    """

    def _init_state_dict_cfg(self, state_dict_cfg: str | dict[str, Any]) -> None:
        super()._init_state_dict_cfg(state_dict_cfg)
        if get_device() == "cpu":  # gathered states would share one buffer
            self.optim_state_dict_config.offload_to_cpu = False

    def build_optim_wrapper(
        self,
        optim_wrapper: Optimizer | BaseOptimWrapper | dict[str, Any],
        model: nn.Module | None = None,
    ) -> BaseOptimWrapper:
        """Build the optimizer wrapper; see MMEngine's ``FSDPStrategy``."""
        if not isinstance(optim_wrapper, dict):
            return super().build_optim_wrapper(optim_wrapper, model)
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return super().build_optim_wrapper(optim_wrapper, model)

    def load_optim_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's states, each process its share of them."""
        sharded = FullyShardedDataParallel.optim_state_dict_to_load(
            model=self.model,
            optim=self.optim_wrapper.optimizer,
            optim_state_dict=state_dict,
        )
        self.optim_wrapper.load_state_dict(sharded)
