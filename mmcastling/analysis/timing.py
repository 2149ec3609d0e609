"""Wall-clock time of a model's forward passes, inside whatever loop drives them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn


class ForwardTimer:
    """Times every forward pass of a model, post-processing included.

    Used as a context manager around a loop; devices are synchronised at both ends of a
    pass, so do not use it to judge a training loop's throughput.

    Args:
        model: The model whose ``forward`` is timed.

    Attributes:
        seconds: One entry per forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seconds: list[float] = []
        self._handles: list[Any] = []
        self._start = 0.0

    def __enter__(self) -> ForwardTimer:
        def before(*_: Any) -> None:
            synchronise()
            self._start = time.perf_counter()

        def after(*_: Any) -> None:
            synchronise()
            self.seconds.append(time.perf_counter() - self._start)

        self._handles = [
            self.model.register_forward_pre_hook(before),
            self.model.register_forward_hook(after),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def median(self) -> float:
        """Median seconds per pass, the first left out as warm-up where there are more.

        Raises:
            ValueError: If nothing was timed.
        """
        if not self.seconds:
            raise ValueError("no forward pass was timed")
        return statistics.median(self.seconds[1:] or self.seconds)


def synchronise() -> None:
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
            synchronise()
            start = time.perf_counter()
            passes[name]()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_medians(
    passes: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Medians of :func:`paired_seconds`."""
    seconds = paired_seconds(passes, repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}
