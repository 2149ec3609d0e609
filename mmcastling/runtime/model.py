"""An exported file as a function of a preprocessed batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from mmcastling.runtime.metadata import ExportedModelError, ExportMetadata
from mmcastling.runtime.sessions import SUFFIXES, open_session


def load_exported(
    path: str | os.PathLike[str],
    runtime: str | None = None,
    threads: int | None = None,
) -> ExportedModel:
    """Load a file that ``tools/export.py`` wrote.

    Args:
        path: ``.onnx``, ``.xml`` (OpenVINO, its ``.bin`` beside it), ``.torchscript``
            or ``.pt2`` (exported program).
        runtime: ``'onnxruntime'``, ``'openvino'`` or ``'torch'``, one that reads the
            format. Defaults to None (the format's own).
        threads: Threads of the CPU. Defaults to None (the runtime's choice).

    Raises:
        ExportedModelError: If the file is missing, damaged or no exported model, or
            the runtime is not installed or does not read its format.
    """
    return ExportedModel(path, runtime, threads)


class ExportedModel:
    """A loaded model; call it with a preprocessed batch.

    Takes the arguments of :func:`load_exported`.

    Attributes:
        metadata: What the file says about its model.
        runtime: What runs it.
        path: The file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        runtime: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._session = open_session(self.path, runtime, threads)
        self.runtime = runtime or SUFFIXES[self.path.suffix][0]
        self.metadata = ExportMetadata.from_json(self._session.metadata, str(path))

    def __call__(
        self, images: Any, image_size: tuple[int, int] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the network.

        Args:
            images: Normalised and padded images ``(B, 3, H, W)``, an array or a
                tensor.
            image_size: ``(H, W)`` of the image inside a padded one, to which a
                detector clips its boxes. Defaults to None (all of it).

        Returns:
            The raw outputs by name, see :class:`ExportMetadata`.

        Raises:
            ExportedModelError: If the file cannot take images of this size, or the
                runtime fails.
        """
        images = np.ascontiguousarray(images, dtype=np.float32)
        self._check(images.shape)
        feeds = {self._session.inputs[0]: images}
        if self.metadata.kind == "detector":
            size = np.asarray(image_size or images.shape[-2:], dtype=np.int64)
            feeds[self._session.inputs[1]] = size
        try:
            outputs = self._session.run(feeds)
        except Exception as error:  # each runtime has its own
            raise ExportedModelError(
                f"{self.runtime} failed on {self.path} with an input of shape "
                f"{images.shape}: {error}"
            ) from error
        return dict(zip(self.metadata.outputs, outputs, strict=True))

    def _check(self, shape: tuple[int, ...]) -> None:
        meta = self.metadata
        if len(shape) != 4 or shape[1] != 3:
            raise ExportedModelError(
                f"{self.path} takes images of shape (B, 3, H, W), got {shape}"
            )
        batch, _, height, width = shape
        if batch != 1 and not (meta.dynamic_batch and batch):
            several = " or more" if meta.dynamic_batch else ""
            raise ExportedModelError(
                f"{self.path} takes 1 image{several} at once, got {batch}: give them "
                "one by one"
            )
        if min(height, width) < meta.min_size or any(
            side % meta.size_divisor for side in (height, width)
        ):
            raise ExportedModelError(
                f"{self.path} cannot take an input of {height}x{width} pixels: height "
                f"and width must be at least {meta.min_size} and multiples of "
                f"{meta.size_divisor}; resize or pad the image"
            )
