"""Fashion-MNIST in memory, from idx files that are there already."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch
from mmpretrain.datasets import FashionMNIST
from torch import Tensor

from mmcastling.run import ConfigError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TRAIN, TEST = FashionMNIST.train_list, FashionMNIST.test_list


def find_data(folder: Path | None) -> Path:
    """The folder with the idx files, compressed or not.

    Raises:
        ConfigError: If there is none; says how to get it.
    """
    candidates = [Path(os.environ.get("MMCASTLING_DATA", "data")) / "fashion-mnist"]
    candidates = [folder] if folder else [*candidates, DEBIAN]
    for candidate in candidates:
        if all(_file(candidate, name) for name, _ in TRAIN + TEST):
            return candidate
    looked = ", ".join(map(str, candidates))
    raise ConfigError(
        f"no Fashion-MNIST in {looked}: install Debian's dataset-fashion-mnist, or "
        "give a folder with train-images-idx3-ubyte.gz and the three other files"
    )


def read(folder: Path, files: list[list[str]], count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images ``(n, 1, 28, 28)``, 0 to 255, and labels of a part.

    Args:
        folder: Where the idx files are.
        files: :data:`TRAIN` or :data:`TEST`.
        count: How many.

    Raises:
        ConfigError: If there are fewer.
    """
    images, labels = (_file(folder, name) for name, _ in files)
    pixels = torch.from_numpy(_read_idx(images, header=16)).view(-1, 1, 28, 28)
    classes = torch.from_numpy(_read_idx(labels, header=8)).long()
    if len(classes) < count:
        raise ConfigError(f"{labels} holds {len(classes)} images, not {count}")
    return pixels[:count], classes[:count]


def _file(folder: Path, name: str) -> Path | None:
    for path in (folder / name.removesuffix(".gz"), folder / name):
        if path.is_file():
            return path
    return None


def _read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes after the header of an idx file."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return np.frombuffer(file.read(), np.uint8, offset=header).copy()
