"""What a model costs, counted or measured, and pictures of what it does."""

from mmcastling.analysis.complexity import (
    ComplexityReport,
    count_macs,
    count_model_macs,
)
from mmcastling.analysis.environment import environment
from mmcastling.analysis.memory import PeakMemory
from mmcastling.analysis.parts import PARTS, PartTimer
from mmcastling.analysis.timing import ForwardTimer, paired_medians, paired_seconds

__all__ = [
    "PARTS",
    "ComplexityReport",
    "ForwardTimer",
    "PartTimer",
    "PeakMemory",
    "count_macs",
    "count_model_macs",
    "environment",
    "paired_medians",
    "paired_seconds",
]
