"""mmcv's compiled ops on torch and torchvision."""

import torch

from mmcastling.compat.mmcv_ops import (  # noqa: F401  (each registers its ops)
    deform,
    focal_loss,
    ms_deform_attn,
    nms,
    roi,
)
from mmcastling.compat.mmcv_ops.calling import KERNELS, register_op


@register_op("")
def get_compiler_version(op: object) -> str:
    """What environment reports print for mmcv's C++ compiler."""
    return "n/a (ops by mmcastling on torchvision)"


@register_op("")
def get_compiling_cuda_version(op: object) -> str:
    """What environment reports print for the CUDA that mmcv was compiled with."""
    return f"n/a (torch {torch.__version__} has CUDA {torch.version.cuda})"


__all__ = ["KERNELS"]
