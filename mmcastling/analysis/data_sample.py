"""What models of the toolboxes take: channels of images, stand-ins for data samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn


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
