"""MaskDecayHook: the auxiliary masks go to zero while the model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mmcastling.attention import CastlingMixer, MaskThreshold
from mmcastling.decay import MaskDecay
from mmcastling.errors import OptionError
from mmcastling.registry import HOOKS
from mmcastling.verbs import MASK_META_KEY, castling_modules, restore_mask


@MMENGINE_HOOKS.register_module()
@HOOKS.register_module()
class MaskDecayHook(Hook):
    """Decay the auxiliary softmax masks of a castled model to zero during training.

    The state is a pure function of training progress (finished iterations over all
    iterations), never of the previous state, so that resume, gradient accumulation and
    EMA cannot bend it. Configured in ``custom_hooks`` of any OpenMMLab toolbox::

        custom_hooks = [dict(type='MaskDecayHook', mode='threshold', finish=0.7)]

    Args:
        mode: As of :class:`~mmcastling.decay.MaskDecay`, as what follows.
        start: See there.
        end: See there.
        begin: See there.
        finish: See there.
        curve: See there.
        mask_penalty: Add the gradient of ``mask_penalty`` times the sum of all
            surviving probabilities, while the branch is on: the masks are pushed
            towards zero as well as cut. The sum runs over images, heads, queries and
            keys, at most ``B h N`` per attention. It follows loss scaling and gradient
            accumulation as a term of the loss would. Defaults to 0.
        val_deployed: Validate with the branch off, so that the metric in the log is the
            one that ships. Defaults to True.
        interval: Iterations between two records of the state in the log. Defaults to
            10.

    Raises:
        ValueError: If an option is out of range, or, when training starts, if the model
            has no castling attention with a branch.
    """

    priority = "NORMAL"

    def __init__(
        self,
        mode: str = "threshold",
        start: float | str = 0.02,
        end: float | str = 1.0,
        begin: float = 0.0,
        finish: float = 0.7,
        curve: str = "exp",
        mask_penalty: float = 0.0,
        val_deployed: bool = True,
        interval: int = 10,
    ) -> None:
        self.decay = MaskDecay(mode, start, end, begin, finish, curve)
        if not 0.0 <= mask_penalty < math.inf:
            raise OptionError(
                f"mask_penalty={mask_penalty!r} must be a finite number that is not "
                "negative"
            )
        if interval < 1:
            raise OptionError(f"interval={interval!r} must be at least 1 iteration")
        self.mask_penalty = mask_penalty
        self.val_deployed = val_deployed
        self.interval = interval
        self._masks_before_val: list[tuple[Any, tuple[Any, ...]]] = []
        self._resumed: dict[str, Any] = {}

    def state_at(self, progress: float) -> tuple[MaskThreshold, float]:
        """Threshold and weight at a fraction of training: a pure function."""
        return self.decay.state_at(progress)

    @staticmethod
    def progress(iteration: int, max_iters: int) -> float:
        """Fraction of training at an iteration, 1 at the last one."""
        return min(1.0, iteration / max(1, max_iters - 1))

    def before_run(self, runner: Runner) -> None:
        loop = runner._val_loop  # the property would build one where none is needed
        if self.val_deployed and isinstance(loop, BaseLoop) and "run" not in vars(loop):
            loop.run = self._restoring(loop.run)

    def _restoring(self, run: Callable[[], Any]) -> Callable[[], Any]:
        def run_and_restore() -> Any:
            try:
                return run()
            finally:  # there is no hook for what fails
                self._restore_masks()

        return run_and_restore

    def before_train(self, runner: Runner) -> None:
        if not any(True for _ in castling_modules(runner.model)):
            raise OptionError(
                "MaskDecayHook found no castling attention with an auxiliary branch: "
                "castle the backbone (for example type='mmcastling.CastlingViT' with "
                "attention=dict(type='castling')), build it with deploy=False, or "
                "remove the hook from custom_hooks"
            )
        if self.mask_penalty:
            check_one_loss(runner.optim_wrapper, f"mask_penalty={self.mask_penalty:g}")
        if runner.iter and "progress" in self._resumed:
            self._warn_of_return(runner, self._resumed)

    def _warn_of_return(self, runner: Runner, state: dict[str, Any]) -> None:
        then, now = state["progress"], self.progress(runner.iter, runner.max_iters)
        before = MaskThreshold.parse(state["threshold"]), state["weight"]
        threshold, weight = self.state_at(now)
        was_off, is_off = _is_off(*before), _is_off(threshold, weight)
        changes = (threshold, weight) != before and not is_off
        if changes and (was_off or now < then):
            runner.logger.warning(
                f"the checkpoint was saved at {then:.1%} of its training, with mask "
                f"threshold {before[0]} and weight {before[1]:g}; of max_iters="
                f"{runner.max_iters} that is {now:.1%}, so the masks go back to "
                f"threshold {threshold} and weight {weight:g}. To keep them off, set "
                "finish to a smaller fraction or remove MaskDecayHook"
            )

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self._apply(runner)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        due = self.every_n_train_iters(runner, self.interval)
        if due or runner.iter == 0 or self.is_last_train_iter(runner):
            self._log(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        if self.val_deployed:
            for module in _modules(runner):
                state = self._state(runner)
                if mask := getattr(module, "branch", None):
                    state = (mask.threshold, mask.weight, mask.penalty)
                self._masks_before_val.append((module, state))
                module.set_mask(1.0)

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        self._restore_masks()  # before a checkpoint is saved

    def _restore_masks(self) -> None:
        while self._masks_before_val:
            module, state = self._masks_before_val.pop()
            module.set_mask(*state)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        threshold, weight = self._state(runner)
        checkpoint.setdefault("meta", {})[MASK_META_KEY] = dict(
            mode=self.decay.mode,
            threshold=str(threshold),
            weight=weight,
            progress=self.progress(runner.iter, runner.max_iters),
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        restore_mask(runner.model, checkpoint)
        self._resumed = (checkpoint.get("meta") or {}).get(MASK_META_KEY) or {}

    def after_train(self, runner: Runner) -> None:
        self._set(runner)  # no backward pass follows, and no loss to scale
        modules = [module for _, module in castling_modules(runner.model)]
        if any(getattr(module, "mask_is_on", False) for module in modules):
            threshold, weight = self._state(runner)
            runner.logger.warning(
                "training ended with the auxiliary softmax branch still on "
                f"(threshold {threshold}, weight {weight:g}): pruning it will change "
                "the output. Use mode='weight', or mode='threshold' with end=1"
            )

    def _state(self, runner: Runner) -> tuple[MaskThreshold, float]:
        return self.state_at(self.progress(runner.iter, runner.max_iters))

    def _apply(self, runner: Runner) -> None:
        penalty = self.mask_penalty
        if penalty:
            penalty *= loss_factor(runner.optim_wrapper)
        self._set(runner, penalty)

    def _set(self, runner: Runner, penalty: float = 0.0) -> None:
        state = self._state(runner)
        for module in _modules(runner):
            module.set_mask(*state, penalty)

    def _log(self, runner: Runner) -> None:
        threshold, weight = self._state(runner)
        density = _densities(runner.model)
        if density is None:  # all attentions are others'
            return
        all_reduce(density, "mean")  # over processes, all of which are here
        densities = density.tolist()
        scalars = dict(
            threshold=threshold.probability, weight=weight, density=fmean(densities)
        )
        if self.decay.start.multiple or self.decay.end.multiple:
            scalars["threshold_uniform"] = threshold.multiple
        thirds = ("early", "middle", "late")[: len(densities)]
        n, g = len(densities), len(thirds)
        for i, name in enumerate(thirds):
            group = densities[i * n // g : (i + 1) * n // g]
            scalars[f"density_{name}"] = fmean(group)
        for name, value in scalars.items():
            # LoggerHook hands every scalar under 'train/' to all visualizer backends.
            runner.message_hub.update_scalar(f"train/mask_{name}", value)


def _is_off(threshold: MaskThreshold, weight: float) -> bool:
    return threshold.rejects_all or not weight


def _modules(runner: Runner) -> Iterator[CastlingMixer]:
    """What is trained, and the averaged copies that hooks as ``EMAHook`` keep of it."""
    copies = (getattr(hook, "ema_model", None) for hook in runner.hooks)
    for model in (runner.model, *copies):
        if isinstance(model, nn.Module):
            for _, module in castling_modules(model):
                yield module


def _densities(model: nn.Module) -> Tensor | None:
    """The density of each attention that measures it, on the model's device.

    Where an attention has not been trained, as frozen ones are not, it is on the CPU.
    """
    device = next(model.parameters()).device
    modules = [module for _, module in castling_modules(model)]
    found = [m.branch.density.to(device) for m in modules if hasattr(m, "branch")]
    return torch.stack(found) if found else None


def check_one_loss(optim_wrapper: OptimWrapper, what: str) -> None:
    """Raise OptionError where there is no one loss for a term of it to follow.

    ``what`` is the setting that adds the term, and how to leave it out.
    """
    if not isinstance(optim_wrapper, OptimWrapperDict):
        return
    wrappers = dict(optim_wrapper.items())
    scalers = {n: getattr(w, "loss_scaler", None) for n, w in wrappers.items()}
    scaled = [n for n, scaler in scalers.items() if scaler and scaler.is_enabled()]
    counts = {n: w._accumulative_counts for n, w in wrappers.items()}
    if len(wrappers) > 1 and (scaled or len(set(counts.values())) > 1):
        raise OptionError(
            f"{what} follows the loss, which these optimizer wrappers scale each in "
            f"its own way: accumulative_counts {counts}, loss scales of {scaled}. Give "
            "them one accumulative_counts and no AmpOptimWrapper, or leave it out"
        )


def loss_factor(optim_wrapper: OptimWrapper) -> float:
    """What the optimizer wrapper multiplies the loss by before its backward pass."""
    if isinstance(optim_wrapper, OptimWrapperDict):  # of which all do the same
        optim_wrapper = next(iter(optim_wrapper.values()))
    factor = optim_wrapper.scale_loss(torch.ones(())).item()
    scaler = getattr(optim_wrapper, "loss_scaler", None)
    return factor if scaler is None else factor * scaler.get_scale()
