"""COCO evaluation by faster-coco-eval inside mmdet's metrics, where it is installed.

And files of COCO's format as Windows writes them.

mmdet's ``CocoMetric`` names pycocotools' ``COCOeval`` in its module. What replaces it
there for the time of an evaluation gives the same numbers; everything else, the files
that the metric writes and the names of its results, stays mmdet's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

_HOSTS = (
    "mmdet.evaluation.metrics.coco_metric",
    "mmdet.evaluation.metrics.ov_coco_metric",
    "mmdet.evaluation.metrics.dod_metric",
)
_NAMES = ("COCOeval", "COCOevalMP")
_FASTER_HOST = "mmdet.evaluation.metrics.faster_coco_metric"
"""A metric of some mmdet releases that names the library itself, and is left alone."""

DEFAULT_MAX_DETECTIONS = 100
"""Detections per image and class of pycocotools' headline AP, whatever ``maxDets``."""


def read_byte_order_marks() -> None:
    """Let pycocotools read JSON that begins with a byte order mark, as on Windows."""
    coco = importlib.import_module("pycocotools.coco")
    coco.open = functools.partial(open, encoding="utf-8-sig")


@contextlib.contextmanager
def fast_coco_eval(metrics: Iterable[object], enabled: bool = True) -> Iterator[str]:
    """Let mmdet's COCO metrics evaluate with faster-coco-eval while this is open.

    Yields the name and version of what evaluates, pycocotools if it is not
    ``enabled`` or not installed; nothing where no metric is COCO's.
    """
    if not any(_is_coco_metric(metric) for metric in metrics):
        yield ""
        return
    evaluator = _faster_evaluator() if enabled else None
    if evaluator is None:
        yield f"pycocotools {importlib.metadata.version('pycocotools')}"
        return
    with contextlib.ExitStack() as stack:
        for host in _HOSTS:
            module = sys.modules.get(host)
            for name in _NAMES:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, evaluator))
        yield f"faster-coco-eval {importlib.metadata.version('faster-coco-eval')}"


def _is_coco_metric(metric: object) -> bool:
    """Whether it computes its numbers in mmdet's ``CocoMetric``, or one of its kin."""
    modules = {kind.__module__ for kind in type(metric).__mro__}
    return bool(modules & set(_HOSTS)) and _FASTER_HOST not in modules


def _faster_evaluator() -> type | None:
    """A ``COCOeval`` as pycocotools has it, on faster-coco-eval's counting."""
    try:
        library = importlib.import_module("faster_coco_eval")
    except ImportError:
        return None

    class FasterCOCOeval(library.COCOeval_faster):
        """Prints as pycocotools does, and has its headline AP."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, print_function=print, **kwargs)

        def summarize(self) -> None:
            super().summarize()
            # The library's first number counts as many detections as its last maxDets,
            # pycocotools' always 100; mmdet asks for up to 1,000.
            limits, kind = list(self.params.maxDets), self.params.iouType
            if kind in ("bbox", "segm") and limits[-1] != DEFAULT_MAX_DETECTIONS:
                self.stats[0] = self._headline(limits)

        def _headline(self, limits: list[int]) -> float:
            if DEFAULT_MAX_DETECTIONS not in limits:
                return -1.0  # as pycocotools
            index = limits.index(DEFAULT_MAX_DETECTIONS)
            # (thresholds, recalls, classes, areas, limits), all areas first
            precision = self.eval["precision"][:, :, :, 0, index]
            precision = precision[precision > -1]
            mean = float(precision.mean()) if precision.size else -1.0
            print(
                f" {'Average Precision':<18} (AP) @[ IoU=0.50:0.95 | area=   all | "
                f"maxDets={DEFAULT_MAX_DETECTIONS:>3d} ] = {mean:0.3f}"
            )
            return mean

    return FasterCOCOeval
