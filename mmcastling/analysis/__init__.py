"""What a model costs, counted or measured, and pictures of what it does."""

from mmcastling.analysis.complexity import (
    ComplexityReport,
    count_macs,
    count_model_macs,
)
from mmcastling.analysis.timing import ForwardTimer, paired_medians

__all__ = [
    "ComplexityReport",
    "ForwardTimer",
    "count_macs",
    "count_model_macs",
    "paired_medians",
]
