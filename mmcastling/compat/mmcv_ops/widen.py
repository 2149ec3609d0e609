"""The number format in which the stand-in kernels compute."""

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def widen(tensor: Tensor) -> Tensor:
    """Return ``tensor`` itself, or in float32 if it is float16 or bfloat16.

    torchvision's CPU kernels know no half formats, its CUDA kernels no bfloat16, and
    box coordinates of several hundred pixels do not fit in either.
    """
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor
