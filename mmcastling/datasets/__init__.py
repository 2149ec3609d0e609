"""Embedded data, and a check of COCO files; free of torch and of the OpenMMLab stack.

``prepare_nuclei`` writes a small real instance-segmentation set without COCO on disk;
``check_coco`` says in words what is wrong with an annotation file.
"""

from mmcastling.datasets.coco_check import CocoFormatError, CocoSummary, check_coco
from mmcastling.datasets.errors import DatasetError
from mmcastling.datasets.nuclei import prepare_nuclei
from mmcastling.datasets.nuclei_check import (
    NucleiSummary,
    SplitSummary,
    verify_nuclei,
)

__all__ = [
    "CocoFormatError",
    "CocoSummary",
    "DatasetError",
    "NucleiSummary",
    "SplitSummary",
    "check_coco",
    "prepare_nuclei",
    "verify_nuclei",
]
