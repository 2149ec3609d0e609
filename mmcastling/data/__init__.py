"""Checks of a user's data before training; free of torch and of the OpenMMLab stack.

``check_coco`` says in words what is wrong with an annotation file, and
``check_segmentation`` what is wrong with images and their label maps.
"""

from mmcastling.data.coco_check import check_coco
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
    "check_coco",
    "check_segmentation",
]
