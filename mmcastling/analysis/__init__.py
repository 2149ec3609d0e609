"""What a model costs, counted or measured, and pictures of what it does."""

from mmcastling.analysis.complexity import (
    ComplexityReport,
    count_macs,
    count_model_macs,
)
from mmcastling.analysis.environment import environment
from mmcastling.analysis.memory import PeakMemory
from mmcastling.analysis.timing import ForwardTimer, paired_medians, paired_seconds

__all__ = [
    "ComplexityReport",
    "ForwardTimer",
    "PeakMemory",
    "count_macs",
    "count_model_macs",
    "environment",
    "paired_medians",
    "paired_seconds",
]
