"""What models of the toolboxes take: channels of images, stand-ins for data samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from mmcastling.errors import OptionError


class Instances(SimpleNamespace):
    """Boxes and what belongs to each, as many as there are ``bboxes``."""

    def __len__(self) -> int:
        return len(self.bboxes)


class DataSample(SimpleNamespace):
    """What a model asks about one image: its size ``(H, W)``, and that with padding.

    Data are what else there is, such as ``gt_instances``.
    """

    def __init__(
        self, size: tuple[int, int], padded: tuple[int, int], **data: Any
    ) -> None:
        self.metainfo = dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=padded,
            batch_input_shape=padded,
            scale_factor=(1.0, 1.0),
        )
        super().__init__(**self.metainfo, **data)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """What is known under a name."""
        return getattr(self, name, default)


def input_channels(model: nn.Module) -> int:
    """How many channels the images of a model have, by its first convolution.

    The backbone's, where it has one; 3 for a network without convolutions.
    """
    for module in getattr(model, "backbone", model).modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
        if type(module).__name__ == "Focus":  # YOLOX's, of four pixels at once
            return input_channels(module.conv) // 4
    return 3


def check_size(size: Sequence[int]) -> None:
    """Raise an OptionError unless a size is ``(H, W)``, two positive integers."""
    if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise OptionError(
            f"size {tuple(size)}: give a height and a width, two positive integers"
        )


def whole_pass(images: Tensor) -> Callable[[nn.Module], Any]:
    """What a model of any toolbox, or a plain module, computes for images.

    Of MMEngine's models backbone, neck and heads (``mode='tensor'``), without what only
    decoding computes.

    Args:
        images: ``(B, C, H, W)`` as the network sees them.

    Returns:
        A function of the model.
    """
    shape = (images.shape[2], images.shape[3])
    # Sparse R-CNN's mode='tensor' assigns targets: none, here.
    none = Instances(bboxes=images.new_empty((0, 4)), labels=images.new_empty(0).long())
    samples = [DataSample(shape, shape, gt_instances=none) for _ in images]

    def run(model: nn.Module) -> Any:
        if not hasattr(model, "data_preprocessor"):  # which all models of MMEngine have
            return model(images)
        head = getattr(model, "decode_head", None)
        arguments = inspect.signature(type(head).forward).parameters if head else ()
        if "batch_data_samples" in arguments:
            # mmseg's mode='tensor' does not know Mask2Former's head.
            return head.forward(model.extract_feat(images), samples)
        return model(images, samples, mode="tensor")

    return run
