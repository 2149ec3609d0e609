"""Seconds of forward passes: of contenders in turns, of a model by its parts."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

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
    passes: dict[str, Callable[[], Any]], repeats: int, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of several contenders, timed in turns.

    Taking turns lets a machine that grows slower or busier hit all of them alike; the
    order is reversed every other round. Each is called once unmeasured before, but for
    those that are ``warm``: that have been called already.
    """
    for run in () if warm else passes.values():
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
    passes: dict[str, Callable[[], Any]], repeats: int, warm: bool = False
) -> dict[str, float]:
    """Medians of :func:`paired_seconds`."""
    seconds = paired_seconds(passes, repeats, warm)
    return {name: statistics.median(values) for name, values in seconds.items()}


def repeats_within(budget: float, seconds: float) -> int:
    """How many passes of so many seconds a budget is for: 3 at least, 15 at most."""
    return min(15, max(3, int(budget / seconds)))


class PartTimer:
    """Times every forward pass of a model inside a ``with`` block, split by part.

    ``backbone`` and ``neck`` are the modules of those names. ``post-processing`` is
    what turns raw outputs into predictions, in the heads' ``predict_by_feat`` or
    ``_get_predictions`` and the model's ``postprocess_result``: decoding, suppression
    (of proposals, too), pasting of masks, resizing of score maps. ``heads`` is
    the rest of the pass, pooling of regions included. Time counts once, to the
    innermost part, so that the four add up to the pass. A module without a backbone is
    timed as a whole.

    Devices are synchronized at both ends of a part, so do not use it to judge a
    training loop's throughput.

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
        self._patches = ExitStack()

    @property
    def median(self) -> float:
        """Median seconds of passes; of several, the first is left out as a warm-up."""
        return _median(self.seconds)

    @property
    def parts(self) -> dict[str, float]:
        """The same of each part; empty for a model without a ``backbone``."""
        parts = {part: _median([p[part] for p in self.passes]) for part in PARTS}
        return parts if self._can_split else {}

    @property
    def _can_split(self) -> bool:
        return isinstance(getattr(self.model, "backbone", None), nn.Module)

    def __enter__(self) -> PartTimer:
        self._patch(self.model, _called(self.model), self._timed_pass)
        if self._can_split:
            for part in ("backbone", "neck"):
                if isinstance(module := getattr(self.model, part, None), nn.Module):
                    self._patch(module, _called(module), self._timed, part)
            for module in self.model.modules():
                for name in _POST_PROCESSING:
                    if callable(getattr(module, name, None)):
                        self._patch(module, name, self._timed, "post-processing")
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def _patch(self, module: nn.Module, name: str, timed: Callable, *args: str) -> None:
        instead = functools.partial(timed, *args, getattr(module, name))
        self._patches.enter_context(patch.object(module, name, instead))

    def _timed_pass(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        # A pass that raised may have left parts open.
        self._running, self._stack = dict.fromkeys(PARTS, 0.0), []
        result = self._timed("heads", function, *args, **kwargs)
        self.passes.append(self._running)
        self.seconds.append(sum(self._running.values()))
        return result

    def _timed(self, part: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        self._enter(part)
        result = function(*args, **kwargs)
        self._leave()
        return result

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


def _called(module: nn.Module) -> str:
    """What a call of a module runs: of a compiled one, its clock stays outside."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return "_compiled_call_impl" if compiled else "forward"


def _median(seconds: list[float]) -> float:
    if not seconds:
        raise OptionError("no forward pass was timed")
    return statistics.median(seconds[1:] or seconds)
