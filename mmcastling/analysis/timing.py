"""Seconds of forward passes: of contenders in turns, of a model by its parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmcastling.errors import OptionError

PARTS = ("backbone", "neck", "heads", "post-processing")

_POST_PROCESSING = ("predict_by_feat", "postprocess_result", "_get_predictions")
"""Where the toolboxes turn raw outputs into predictions: mmdet decodes and suppresses
boxes and pastes masks, mmseg resizes scores, mmpretrain takes the best class."""


def synchronize() -> None:
    """Wait until the GPU has done what it was given; nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired_seconds(
    passes: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of several contenders, timed in turns.

    Taking turns lets a machine that grows slower or busier hit all of them alike; the
    order is reversed every other round.

    Args:
        passes: What to time, by name; each is called once unmeasured.
        repeats: Rounds.

    Returns:
        One entry per round, by name.
    """
    for run in passes.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(repeats):
        for name in list(passes) if turn % 2 == 0 else reversed(passes):
            synchronize()
            start = time.perf_counter()
            passes[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_medians(
    passes: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Medians of :func:`paired_seconds`."""
    seconds = paired_seconds(passes, repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


class PartTimer:
    """Times every forward pass of a model inside a ``with`` block, split by part.

    ``backbone`` and ``neck`` are the modules of those names. ``post-processing`` is
    what turns raw outputs into predictions, in the heads' ``predict_by_feat`` or
    ``_get_predictions`` and the model's ``postprocess_result``: decoding, suppression
    (of proposals, too), pasting of masks, resizing of score maps. ``heads`` is
    the rest of the pass, pooling of regions included. Time counts once, to the
    innermost part, so that the four add up to the pass.

    Devices are synchronized at both ends of a part, so do not use it to judge a
    training loop's throughput.

    Args:
        model: A detector, segmentor or classifier of the toolboxes, or any module,
            which is then timed as a whole.

    Attributes:
        passes: Seconds of each pass by part.
        seconds: Seconds of each pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self._running: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0
        self._undo: list[Callable[[], None]] = []

    @property
    def median(self) -> float:
        """Median seconds per pass, the first left out as warm-up where there are more.

        Raises:
            ValueError: If nothing was timed.
        """
        return _median(self.seconds)

    @property
    def parts(self) -> dict[str, float]:
        """The same of each part; empty for a model without a part called ``backbone``.

        Raises:
            ValueError: If nothing was timed.
        """
        parts = {part: _median([p[part] for p in self.passes]) for part in PARTS}
        return parts if self._can_split else {}

    @property
    def _can_split(self) -> bool:
        return isinstance(getattr(self.model, "backbone", None), nn.Module)

    def __enter__(self) -> PartTimer:
        self._hook(self.model, self._begin_pass, self._end_pass)
        if self._can_split:
            for part in ("backbone", "neck"):
                if isinstance(module := getattr(self.model, part, None), nn.Module):
                    self._time_module(module, part)
            for module in self.model.modules():
                for name in _POST_PROCESSING:
                    if callable(getattr(module, name, None)):
                        self._time_method(module, name, "post-processing")
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _begin_pass(self) -> None:
        # A pass that raised may have left parts open.
        self._running, self._stack = dict.fromkeys(PARTS, 0.0), []
        self._enter("heads")

    def _end_pass(self) -> None:
        self._leave()
        self.passes.append(self._running)
        self.seconds.append(sum(self._running.values()))

    def _hook(
        self, module: nn.Module, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        handles = (
            module.register_forward_pre_hook(lambda *_: before(), prepend=True),
            module.register_forward_hook(lambda *_: after()),
        )
        self._undo += [handle.remove for handle in handles]

    def _time_module(self, module: nn.Module, part: str) -> None:
        if getattr(module, "_compiled_call_impl", None) is not None:
            # Hooks would be compiled with it, and their clock with them.
            self._time_method(module, "_compiled_call_impl", part)
        else:
            self._hook(module, lambda: self._enter(part), self._leave)

    def _time_method(self, module: nn.Module, name: str, part: str) -> None:
        function, own = getattr(module, name), name in vars(module)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            result = function(*args, **kwargs)
            self._leave()
            return result

        setattr(module, name, timed)
        self._undo.append(
            lambda: setattr(module, name, function) if own else delattr(module, name)
        )

    def _enter(self, part: str) -> None:
        self._credit()
        self._stack.append(part)

    def _leave(self) -> None:
        self._credit()
        if self._stack:
            self._stack.pop()

    def _credit(self) -> None:
        synchronize()
        now = time.perf_counter()
        if self._stack:
            self._running[self._stack[-1]] += now - self._since
        self._since = now


def _median(seconds: list[float]) -> float:
    if not seconds:
        raise OptionError("no forward pass was timed")
    return statistics.median(seconds[1:] or seconds)
