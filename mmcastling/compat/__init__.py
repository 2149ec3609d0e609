"""mmcv's compiled ops on torchvision's kernels, for an mmcv built without them."""

from mmcastling.compat.mmcv_ext import (
    SUPPLIED_OPS,
    MissingOpError,
    install_mmcv_ops,
)

__all__ = ["SUPPLIED_OPS", "MissingOpError", "install_mmcv_ops"]
