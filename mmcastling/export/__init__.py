"""From a deployed model to a file that a stock runtime runs."""

from mmcastling.export.boxes import UnsupportedModelError
from mmcastling.export.formats import (
    DEFAULT_OPSET,
    FORMAT_PRECISIONS,
    FORMATS,
    OPSETS,
    check_export_precision,
    check_format,
    lower,
    write,
)
from mmcastling.export.graphs import export_graph, kind_of

__all__ = [
    "DEFAULT_OPSET",
    "FORMATS",
    "FORMAT_PRECISIONS",
    "OPSETS",
    "UnsupportedModelError",
    "check_export_precision",
    "check_format",
    "export_graph",
    "kind_of",
    "lower",
    "write",
]
