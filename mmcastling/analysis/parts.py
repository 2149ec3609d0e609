"""Where a forward pass spends its time: backbone, neck, heads and post-processing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from mmcastling.analysis.timing import ForwardTimer, synchronise

PARTS = ("backbone", "neck", "heads", "post-processing")

_POST_PROCESSING = ("predict_by_feat", "postprocess_result", "_get_predictions")
"""Where the toolboxes turn raw outputs into predictions: mmdet decodes and suppresses
boxes and pastes masks, mmseg resizes scores, mmpretrain takes the best class."""


class PartTimer(ForwardTimer):
    """Times every forward pass of a model, and splits it into :data:`PARTS`.

    ``backbone`` and ``neck`` are the modules of those names. ``post-processing`` is
    what turns raw outputs into predictions, in the heads' ``predict_by_feat`` or
    ``_get_predictions`` and the model's ``postprocess_result``: decoding, suppression
    (of proposals, too), pasting of masks, resizing of score maps. ``heads`` is
    the rest of the pass, pooling of regions included. Time counts once, to the
    innermost part, so that the four add up to the pass.

    Args:
        model: A detector, segmentor or classifier of the toolboxes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.passes: list[dict[str, float]] = []
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0
        self._undo: list[Callable[[], None]] = []

    @property
    def can_split(self) -> bool:
        """Whether the model has a part called ``backbone``."""
        return isinstance(getattr(self.model, "backbone", None), nn.Module)

    @property
    def parts(self) -> dict[str, float]:
        """Median seconds per pass of each part, the first left out as warm-up.

        Empty for a model without a part called ``backbone``, which cannot be split.

        Raises:
            ValueError: If nothing was timed.
        """
        if not self.passes:
            raise ValueError("no forward pass was timed")
        if not self.can_split:
            return {}
        passes = self.passes[1:] or self.passes
        return {part: statistics.median(p[part] for p in passes) for part in PARTS}

    def __enter__(self) -> PartTimer:
        self._time_pass()
        if self.can_split:
            for part in ("backbone", "neck"):
                if isinstance(module := getattr(self.model, part, None), nn.Module):
                    self._time_module(module, part)
            for module in self.model.modules():
                for name in _POST_PROCESSING:
                    if callable(getattr(module, name, None)):
                        self._time_method(module, name, "post-processing")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        while self._undo:
            self._undo.pop()()

    def _time_pass(self) -> None:
        def before(*_: Any) -> None:
            # A pass that raised may have left parts open.
            self._seconds, self._stack = dict.fromkeys(PARTS, 0.0), []
            self._enter("heads")

        def after(*_: Any) -> None:
            self._leave()
            self.passes.append(self._seconds)
            self.seconds.append(sum(self._seconds.values()))

        self._handles += [
            self.model.register_forward_pre_hook(before, prepend=True),
            self.model.register_forward_hook(after),
        ]

    def _time_module(self, module: nn.Module, part: str) -> None:
        if getattr(module, "_compiled_call_impl", None) is not None:
            # Hooks would be compiled with it, and their clock with them.
            compiled = module._compiled_call_impl
            module._compiled_call_impl = self._timed(compiled, part)
            self._undo.append(lambda: setattr(module, "_compiled_call_impl", compiled))
            return
        self._handles += [
            module.register_forward_pre_hook(
                lambda *_: self._enter(part), prepend=True
            ),
            module.register_forward_hook(lambda *_: self._leave()),
        ]

    def _time_method(self, module: nn.Module, name: str, part: str) -> None:
        before = vars(module).get(name)
        setattr(module, name, self._timed(getattr(module, name), part))

        def undo() -> None:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)

        self._undo.append(undo)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            result = function(*args, **kwargs)
            self._leave()
            return result

        return timed

    def _enter(self, part: str) -> None:
        self._credit()
        self._stack.append(part)

    def _leave(self) -> None:
        self._credit()
        if self._stack:
            self._stack.pop()

    def _credit(self) -> None:
        synchronise()
        now = time.perf_counter()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now
