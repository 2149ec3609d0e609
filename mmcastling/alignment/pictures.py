"""Batches of pictures from a folder, the same for a step whenever it is asked for."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmcastling.alignment.pairs import AlignError
from mmcastling.errors import OptionError

logger = logging.getLogger("mmcastling")
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class PictureBatches:
    """Normalised crops of the pictures in a folder and those below it, without labels.

    A random crop has half to all of the area of the largest of its shape, and is
    flipped half of the time. Which pictures, crops and size a step has depends on the
    step and the seed alone.

    Args:
        folder: Of pictures; what cannot be read is skipped, with a warning.
        sizes: ``(H, W)`` that a step may have, taken in turn. Defaults to 224x224.
        batch_size: Pictures of a step. Defaults to 8.
        mean: Of the channels, red, green and blue from 0 to 255. Defaults to
            ImageNet's.
        std: Likewise.
        bgr: Whether the network wants blue, green and red, in which order ``mean`` and
            ``std`` are then. Defaults to False.
        seed: Of everything random. Defaults to 0.

    Raises:
        AlignError: If the folder has no readable picture.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        sizes: Sequence[tuple[int, int]] = ((224, 224),),
        batch_size: int = 8,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        bgr: bool = False,
        seed: int = 0,
    ) -> None:
        from mmcastling.runtime.images import PICTURES  # which needs OpenCV

        self.sizes, self.batch_size, self.seed = list(sizes), batch_size, seed
        if batch_size < 1 or any(min(size) < 1 for size in self.sizes) or not sizes:
            raise OptionError(
                f"sizes {self.sizes} and batch_size {batch_size}: give sizes (H, W) "
                "and a number of pictures, all above 0"
            )
        self._order = slice(None) if bgr else slice(None, None, -1)  # files are BGR
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.paths = sorted(
            path for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURES
        )
        self.folder = folder
        self.described = (
            f"{self.sizes} x {batch_size} of {len(self.paths)} pictures in {folder}, "
            f"seed {seed}, {'BGR' if bgr else 'RGB'} {tuple(mean)} {tuple(std)}"
        )
        self._skipped: set[Path] = set()
        self._check_readable()

    def __call__(self, step: int) -> Tensor:
        """The batch ``(B, 3, H, W)`` of a step."""
        return self.batch(step, self.sizes[step % len(self.sizes)])

    def split(self, share: float) -> tuple[PictureBatches, PictureBatches]:
        """The pictures in two parts without a common one: most, and a share of them.

        Raises:
            AlignError: If there is one picture alone.
        """
        if len(self.paths) < 2:
            raise AlignError(
                f"{self.paths[0]} is the only picture: at least two are needed, one to "
                "measure on"
            )
        # Of few pictures a third, as one alone says little.
        least = min(8, max(1, len(self.paths) // 3))
        count = max(least, round(share * len(self.paths)))
        count = min(len(self.paths) - 1, count)
        order = np.random.default_rng(self.seed).permutation(len(self.paths))
        parts = copy.copy(self), copy.copy(self)
        for part, chosen in zip(parts, (order[count:], order[:count]), strict=True):
            part.paths = [self.paths[i] for i in sorted(chosen)]
            part._check_readable()
        return parts

    def batch(self, step: int, size: tuple[int, int]) -> Tensor:
        """The batch of a step at another size ``(H, W)``."""
        crops: list[Tensor] = []
        for path in self._paths_from(step * self.batch_size):
            picture = self._read(path)
            if picture is not None:
                noise = np.random.default_rng((self.seed, step, len(crops)))
                crops.append(self._crop(picture, size, noise))
            if len(crops) == self.batch_size:
                break
        return torch.stack(crops)

    def _check_readable(self) -> None:
        from mmcastling.runtime.images import PICTURES

        if not any(self._read(path) is not None for path in self.paths):
            raise AlignError(
                f"{self.folder} has no picture that can be read ({len(self.paths)} "
                f"files named as pictures): give a folder of "
                f"{', '.join(sorted(PICTURES))}"
            )

    def _paths_from(self, index: int) -> Iterator[Path]:
        """Pictures without end, from one on, in an order of its own for each epoch."""
        epoch, place = divmod(index, len(self.paths))
        while True:
            noise = np.random.default_rng((self.seed, epoch))
            yield from (
                self.paths[i] for i in noise.permutation(len(self.paths))[place:]
            )
            epoch, place = epoch + 1, 0

    def _read(self, path: Path) -> np.ndarray | None:
        from mmcastling.runtime.images import ExportedModelError, read_image

        try:
            return read_image(path)
        except ExportedModelError:
            if path not in self._skipped:
                self._skipped.add(path)
                logger.warning("%s cannot be read as a picture: it is skipped", path)
            return None

    def _crop(
        self, picture: np.ndarray, size: tuple[int, int], noise: np.random.Generator
    ) -> Tensor:
        import cv2

        height, width = picture.shape[:2]
        # The largest crop of this shape, and a part of it.
        scale = min(height / size[0], width / size[1]) * noise.uniform(0.7, 1.0)
        rows, columns = (max(1, int(side * scale)) for side in size)
        top = int(noise.integers(height - rows + 1))
        left = int(noise.integers(width - columns + 1))
        crop = picture[top : top + rows, left : left + columns, self._order]
        shrinks = rows > size[0]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        crop = cv2.resize(np.ascontiguousarray(crop), size[::-1], interpolation=how)
        if noise.random() < 0.5:
            crop = crop[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1).float()
        return (tensor - self.mean) / self.std
