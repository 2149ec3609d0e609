"""AttentionTeacherHook: castled attentions stay close to the softmax ones they were."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import partial
from statistics import fmean
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmcastling.attention import is_castled
from mmcastling.attention.opaque import OpaqueModule
from mmcastling.attention.peers.softmax import SoftmaxMixer
from mmcastling.checkpoint import load_checkpoint, weights_of
from mmcastling.deploy.verify import tensors_in
from mmcastling.errors import CheckpointError, OptionError
from mmcastling.registry import HOOKS
from mmcastling.train.mask_decay_hook import check_one_loss, loss_factor

# Names of what serves a bias of relative positions.
_BIAS = re.compile(r"rel_pos|relative_position_bias|attention_bias|cpb_mlp")


@MMENGINE_HOOKS.register_module()
@HOOKS.register_module()
class AttentionTeacherHook(Hook):
    """Add the error of each castled attention to the loss of training with labels.

    The error is the mean squared difference between what a castled attention gives and
    what the softmax attention with the original's weights gives for the same tokens;
    ``weight`` times its mean over attentions acts as one more term of the loss, in any
    toolbox. Its plateau is published for weights from 10 to 100 (Copy the Same, Distill
    the Difference, 2026). In ``custom_hooks``, beside ``MaskDecayHook``::

        custom_hooks = [dict(type='AttentionTeacherHook', checkpoint='softmax.pth')]

    Args:
        checkpoint: The softmax original's weights, with the names of the model that is
            trained.
        weight: Factor of the mean error. Defaults to 50.
        interval: Iterations between two records of the error in the log, as
            ``attention_error``. Defaults to 10.

    Raises:
        ValueError: If the weight is not positive, or, when training starts, if no
            castled attention is there or the checkpoint lacks one.
    """

    def __init__(
        self, checkpoint: str, weight: float = 50.0, interval: int = 10
    ) -> None:
        if not 0.0 < weight < float("inf") or interval < 1:
            raise OptionError(
                f"weight={weight!r} and interval={interval!r}: expected a positive "
                "number, and at least 1 iteration"
            )
        self.checkpoint = checkpoint
        self.weight = weight
        self.interval = interval
        self._errors: list[Tensor] = []
        self._handles: list[Any] = []

    def before_train(self, runner: Runner) -> None:
        check_one_loss(runner.optim_wrapper, f"AttentionTeacherHook({self.weight:g})")
        weights = weights_of(load_checkpoint(self.checkpoint))
        pairs = [
            (attention, self._teacher(name, attention, weights))
            for name, attention in castled_attentions(runner.model)
        ]
        if not pairs:
            raise OptionError(
                "AttentionTeacherHook found no castled attention: castle the backbone, "
                "or remove the hook from custom_hooks"
            )
        for attention, teacher in pairs:
            hook = partial(self._add_error, teacher)
            handle = attention.register_forward_hook(hook, with_kwargs=True)
            self._handles.append(handle)

    def after_train(self, runner: Runner) -> None:
        while self._handles:
            self._handles.pop().remove()

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self._errors.clear()
        share = self.weight / len(self._handles)
        self._scale = share * loss_factor(runner.optim_wrapper)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if self._errors and self.every_n_train_iters(runner, self.interval):
            error = fmean(error.item() for error in self._errors)
            runner.message_hub.update_scalar("train/attention_error", error)

    def _teacher(
        self, name: str, attention: nn.Module, weights: dict[str, Tensor]
    ) -> nn.Module:
        """The attention as it was: softmax, with the original's weights, frozen."""
        teacher = copy.deepcopy(attention)
        mixers = {n: m for n, m in teacher.named_modules() if is_castled(m)}
        for path, mixer in mixers.items():
            sizes = mixer.num_heads, mixer.head_dims
            softmax = SoftmaxMixer(*sizes, key_dims=mixer.key_dims)
            teacher.set_submodule(path, softmax)
        own = {
            n.removeprefix(f"{name}."): value
            for n, value in weights.items()
            if n.startswith(f"{name}.")
        }
        lost = [n for n in own.keys() - teacher.state_dict().keys() if _BIAS.search(n)]
        if lost:
            raise OptionError(
                f"{name} has lost {min(lost)}, which its softmax original needs: what "
                "that gives cannot be computed. Castle with type='castling', whose "
                "branch keeps biases of relative positions"
            )
        missing, _ = teacher.load_state_dict(own, strict=False)
        if missing:
            raise CheckpointError(
                f"{self.checkpoint} lacks {name}.{min(missing)}, which the softmax "
                f"original of {name} has: give the checkpoint that was castled, with "
                "the names of the model that is trained"
            )
        teacher.to(next(attention.parameters()).device)
        teacher.requires_grad_(False).train(False)
        return teacher

    def _add_error(
        self,
        teacher: nn.Module,
        attention: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> Any:
        if not attention.training or not torch.is_grad_enabled():
            return None
        with torch.no_grad():
            expected = next(tensors_in(teacher(*args, **kwargs)))
        found = next(tensors_in(output))
        error = (found.float() - expected.float()).square().mean()
        self._errors.append(error.detach())
        with_error = _WithErrorOf.apply(found, error, self._scale)
        if isinstance(output, Tensor):
            return with_error
        return type(output)([with_error, *output[1:]])


class _WithErrorOf(torch.autograd.Function):
    """A tensor as it is, whose backward pass also differentiates an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, error
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None


def castled_attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Castled attentions with their names: what is called by the network around them.

    Names are those of an unwrapped model.
    """
    modules = dict(model.named_modules())
    seen = set()
    for path, module in modules.items():
        if not is_castled(module):
            continue
        name = path.rpartition(".")[0]
        while isinstance(modules.get(holder := name.rpartition(".")[0]), OpaqueModule):
            name = holder  # it cuts the windows, say
        if name not in seen:
            seen.add(name)
            yield name.removeprefix("module."), modules[name]
