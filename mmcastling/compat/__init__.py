"""What OpenMMLab lacks here: compiled ops for mmcv, faster COCO evaluation."""

from mmcastling.compat.coco_eval import fast_coco_eval
from mmcastling.compat.mmcv_ext import (
    SUPPLIED_OPS,
    MissingOpError,
    install_mmcv_ops,
)

__all__ = [
    "SUPPLIED_OPS",
    "MissingOpError",
    "fast_coco_eval",
    "install_mmcv_ops",
]
