"""What a model costs, counted or measured, and pictures of what it does."""

from mmcastling.analysis.complexity import (
    ComplexityReport,
    count_macs,
    count_model_macs,
)
from mmcastling.analysis.data_sample import input_channels
from mmcastling.analysis.timing import PARTS, PartTimer, paired_medians, paired_seconds

__all__ = [
    "PARTS",
    "ComplexityReport",
    "PartTimer",
    "count_macs",
    "count_model_macs",
    "input_channels",
    "paired_medians",
    "paired_seconds",
]
