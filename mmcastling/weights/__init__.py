"""Weights of other libraries for our backbones."""

from mmcastling.weights.import_report import ImportReport
from mmcastling.weights.importing import FAMILIES, import_checkpoint

__all__ = ["FAMILIES", "ImportReport", "import_checkpoint"]
