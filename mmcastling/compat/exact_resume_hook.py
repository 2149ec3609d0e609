"""ExactResumeHook: a resumed run ends with the weights of one never interrupted."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn

from mmcastling.attention.old_names import with_current_names
from mmcastling.compat.seeded_data import (
    BatchStream,
    PlacedBatchSampler,
    place_batches,
    seed_model,
)
from mmcastling.errors import OptionError
from mmcastling.registry import HOOKS

GRADIENTS_KEY = "accumulated_gradients"  # in a checkpoint
META_KEY = "exact_resume"
"""Where a checkpoint's ``meta`` holds what the order of the data depends on."""


@MMENGINE_HOOKS.register_module()
@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Make everything random in training a pure function of its place in training.

    MMEngine loses the states of the random generators, the place inside an epoch, and
    gradients that are still accumulating. With this hook

    - the generators of Python, numpy and torch (of all devices) are seeded before every
      iteration with the run's seed, the iteration and the rank, and before every sample
      with the seed, the epoch and the sample's number in it: the number of workers
      makes no difference;
    - a resumed run begins inside the epoch, after the batches already trained, which
      are counted off and not loaded;
    - a checkpoint inside a window of gradient accumulation holds the gradients.

    On a CPU a run that is killed and resumed then ends with the same bits; on other
    devices as far as their kernels are deterministic (``randomness=dict(
    deterministic=True)``). It needs no option, in any OpenMMLab toolbox::

        default_hooks = dict(
            checkpoint=dict(type='AtomicCheckpointHook', interval=1000, by_epoch=False),
            exact_resume=dict(type='ExactResumeHook'),
        )

    What it cannot restore:

    - another seed, batch size, number of processes or dataset than before: the first is
      an error, the others a warning;
    - what a transform, dataset or worker remembers from earlier samples or draws with a
      generator of its own (mmdet's ``CachedMosaic``, albumentations), and dataloaders
      with ``in_order=False``;
    - what a model or loss remembers outside of its ``state_dict`` (the sizes of
      ``BatchSyncRandomResize`` between two changes, Dynamic R-CNN's history of IoU);
    - a training dataloader that another hook iterates while it has an infinite sampler;
    - gradients still accumulating in processes other than the first: let the interval
      of checkpoints be a multiple of ``accumulative_counts`` there;
    - a validation that was due between the last checkpoint and the kill, and times in
      the log.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._seed_at_start: int | None = None
        self._is_resumed = False
        self._gradients: dict[str, torch.Tensor] = {}
        self._settings_before: dict[str, int] = {}

    def before_run(self, runner: Runner) -> None:
        self._seed_at_start = runner.seed

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._gradients = checkpoint.pop(GRADIENTS_KEY, {})
        self._settings_before = (checkpoint.get("meta") or {}).get(META_KEY, {})

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            raise OptionError(
                f"ExactResumeHook does not know where {type(loop).__name__} draws its "
                "data: use EpochBasedTrainLoop or IterBasedTrainLoop, or remove the "
                "hook"
            )
        loader = loop.dataloader
        if loader.batch_sampler is None:
            raise OptionError(
                "ExactResumeHook needs batches of a sampler's indices: give "
                "train_dataloader a batch_size, or remove the hook"
            )
        self._is_resumed = loop.iter > 0
        if self._is_resumed:
            self._check_setting(runner)
            self._restore_gradients(runner)
        endless = isinstance(loop, IterBasedTrainLoop)
        batches = PlacedBatchSampler(
            loader.batch_sampler, get_rank(), get_world_size(), endless
        )
        loop.dataloader = place_batches(loader, batches, runner.seed)
        if endless:
            loop.dataloader_iterator = BatchStream(loop.dataloader)
            if getattr(loop, "fast_forward_on_resume", False):
                # The loop leaves out the skipping, which it takes to be slow.
                loop.dataloader_iterator.skip_iter(loop.iter)

    def before_train_epoch(self, runner: Runner) -> None:
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            skip = self._batches_done(runner) if self._is_resumed else 0
            loop.dataloader.batch_sampler.begin(loop.epoch, skip)
            if skip:
                # The loop hands its count to all hooks, which compare it with the
                # length of the epoch: it goes on from the batches left out.
                run_iter = loop.run_iter
                loop.run_iter = lambda idx, batch: run_iter(idx + skip, batch)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        seed_model(runner.seed, runner.iter, get_rank())

    def after_train_epoch(self, runner: Runner) -> None:
        self._is_resumed = False  # epochs after the resumed one begin at their begin
        vars(runner.train_loop).pop("run_iter", None)

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.setdefault("meta", {})[META_KEY] = _settings(runner)
        if not _is_accumulating(runner):
            return
        checkpoint[GRADIENTS_KEY] = {
            name: parameter.grad.detach().cpu()
            for name, parameter in _core(runner.model).named_parameters()
            if parameter.grad is not None
        }
        if get_world_size() > 1:
            runner.logger.warning(
                "this checkpoint lies inside a window of gradient accumulation and "
                "holds the gradients of the first process only: a resume from it is "
                "not exact. Let the interval be a multiple of accumulative_counts"
            )

    def _check_setting(self, runner: Runner) -> None:
        if runner.seed != self._seed_at_start:
            raise OptionError(
                f"the checkpoint was trained with seed {runner.seed} and the data is "
                f"in the order of seed {self._seed_at_start}: set randomness=dict("
                f"seed={runner.seed}) in the config"
            )
        for name, now in _settings(runner).items():
            before = self._settings_before.get(name, now)
            if before != now:
                runner.logger.warning(
                    f"resumed with {name}={now}, trained before with {before}: the "
                    "run goes on, but not as one that was never interrupted"
                )

    def _restore_gradients(self, runner: Runner) -> None:
        if not self._gradients:
            return
        parameters = dict(_core(runner.model).named_parameters())
        gradients = with_current_names(self._gradients, parameters)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.to(parameters[name], copy=True)
        self._gradients = {}
        runner.logger.info(
            "restored the gradients of the unfinished accumulation: none is lost"
        )

    def _batches_done(self, runner: Runner) -> int:
        loop = runner.train_loop
        total = len(loop.dataloader)
        done = loop.iter - loop.epoch * total
        if 0 <= done <= total:
            return done
        runner.logger.warning(
            f"iteration {loop.iter} does not lie in epoch {loop.epoch + 1} of {total} "
            "batches: the epoch is begun anew"
        )
        return 0


def _settings(runner: Runner) -> dict[str, int]:
    loader = runner.train_dataloader
    return dict(
        world_size=get_world_size(),
        batch_size=getattr(loader.batch_sampler, "batch_size", 0),
        num_samples=len(loader.dataset),
    )


def _is_accumulating(runner: Runner) -> bool:
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return not all(one.should_update() for one in wrappers)


def _core(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model
