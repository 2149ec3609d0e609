"""From a deployed model to a file that a stock runtime runs."""

from mmcastling.deploy.export.boxes import UnsupportedModelError
from mmcastling.deploy.export.formats import (
    DEFAULT_OPSET,
    FORMATS,
    OPSETS,
    PRECISIONS,
    check_export_precision,
    check_format,
    quantise,
    write,
)
from mmcastling.deploy.export.parts import export_graph, kind_of

__all__ = [
    "DEFAULT_OPSET",
    "FORMATS",
    "OPSETS",
    "PRECISIONS",
    "UnsupportedModelError",
    "check_export_precision",
    "check_format",
    "export_graph",
    "kind_of",
    "quantise",
    "write",
]
