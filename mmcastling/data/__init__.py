"""Embedded data, and checks of a user's; free of torch and of the OpenMMLab stack.

``prepare_nuclei`` writes a small real instance-segmentation set without COCO on disk;
``check_coco`` says in words what is wrong with an annotation file, and
``check_segmentation`` what is wrong with images and their label maps.
"""

from mmcastling.data.coco_check import check_coco
from mmcastling.data.nuclei import prepare_nuclei
from mmcastling.data.nuclei_check import SplitSummary
from mmcastling.data.problems import (
    CocoFormatError,
    DatasetError,
    SegmentationFormatError,
)
from mmcastling.data.segmentation_check import check_segmentation

__all__ = [
    "CocoFormatError",
    "DatasetError",
    "SegmentationFormatError",
    "SplitSummary",
    "check_coco",
    "check_segmentation",
    "prepare_nuclei",
]
