"""The table of mmcv ops that run without mmcv's compiled extension."""

from collections.abc import Callable
from typing import Any

import torch

from mmcastling.compat.mmcv_ops import deform, focal_loss, ms_deform_attn, nms, roi


def get_compiler_version() -> str:
    """What environment reports print for mmcv's C++ compiler."""
    return "n/a (ops by mmcastling on torchvision)"


def get_compiling_cuda_version() -> str:
    """What environment reports print for the CUDA that mmcv was compiled with."""
    return f"n/a (torch {torch.__version__} has CUDA {torch.version.cuda})"


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    get_compiler_version,
    get_compiling_cuda_version,
    nms.nms,
    nms.softnms,
    roi.roi_align_forward,
    roi.roi_align_backward,
    roi.roi_pool_forward,
    roi.roi_pool_backward,
    focal_loss.sigmoid_focal_loss_forward,
    focal_loss.sigmoid_focal_loss_backward,
    focal_loss.softmax_focal_loss_forward,
    focal_loss.softmax_focal_loss_backward,
    deform.deform_conv_forward,
    deform.deform_conv_backward_input,
    deform.deform_conv_backward_parameters,
    deform.modulated_deform_conv_forward,
    deform.modulated_deform_conv_backward,
    ms_deform_attn.ms_deform_attn_forward,
    ms_deform_attn.ms_deform_attn_backward,
)

KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in _FUNCTIONS
}
"""By name; parameters are named and ordered as ``mmcv._ext`` has them."""
