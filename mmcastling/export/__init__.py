"""From a model to a file that a stock runtime runs.

``mmcastling.export(model, "m.onnx", example)`` is :func:`export`, for any module. Its
parts: :func:`write` the file, run it by :mod:`mmcastling.runtime`, :func:`compare` what
comes out, :func:`lower` its precision. On top of them, for deployed models of the
toolboxes: :func:`export_graph` and :func:`describe` what to write by
:func:`write_graph`, and :func:`reference_outputs` to compare with.
"""

import sys
from types import ModuleType

from mmcastling.export.agreement import Agreement, compare, compare_detections
from mmcastling.export.any_module import ExportReport, export
from mmcastling.export.formats import (
    DEFAULT_FORMAT,
    DEFAULT_OPSET,
    FORMAT_PRECISIONS,
    FORMATS,
    OPSETS,
    UnsupportedModelError,
    check_export_precision,
    check_format,
    lower,
    write,
)
from mmcastling.export.graphs import (
    describe,
    export_graph,
    reference_outputs,
    write_graph,
)
from mmcastling.export.proving import DisagreementError

__all__ = [
    "DEFAULT_FORMAT",
    "DEFAULT_OPSET",
    "FORMATS",
    "FORMAT_PRECISIONS",
    "OPSETS",
    "Agreement",
    "DisagreementError",
    "ExportReport",
    "UnsupportedModelError",
    "check_export_precision",
    "check_format",
    "compare",
    "compare_detections",
    "describe",
    "export",
    "export_graph",
    "lower",
    "reference_outputs",
    "write",
    "write_graph",
]


class _Callable(ModuleType):
    """So that ``mmcastling.export`` is the verb as well as the package."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _Callable
