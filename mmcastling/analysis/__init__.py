"""What a model costs, counted or measured, and pictures of what it does."""

from mmcastling.analysis.complexity import (
    ComplexityReport,
    count_macs,
    count_model_macs,
)
from mmcastling.analysis.data_sample import input_channels
from mmcastling.analysis.diagnosis import Diagnosis, Measured, Stage
from mmcastling.analysis.examination import doctor
from mmcastling.analysis.timing import PARTS, PartTimer, paired_medians, paired_seconds

__all__ = [
    "PARTS",
    "ComplexityReport",
    "Diagnosis",
    "Measured",
    "PartTimer",
    "Stage",
    "count_macs",
    "count_model_macs",
    "doctor",
    "input_channels",
    "paired_medians",
    "paired_seconds",
]
