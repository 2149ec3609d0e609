"""Weights of other libraries for our backbones."""

from mmcastling.importers.report import ImportReport
from mmcastling.importers.run import FAMILIES, import_checkpoint

__all__ = ["FAMILIES", "ImportReport", "import_checkpoint"]
