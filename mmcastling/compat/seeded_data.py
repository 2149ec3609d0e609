"""Training data as a pure function of its place in training.

Every sample is drawn with random generators that are seeded with its place, so that no
worker process has a state which a checkpoint would have to hold.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from mmcastling.errors import OptionError

# The first word of a seed's key: the two must never draw alike.
_MODEL, _DATA = 0, 1


class Place(NamedTuple):
    """Where in training a sample stands, and which it is.

    ``position`` counts the samples before it in this epoch, of all processes.
    """

    index: Any
    epoch: int
    position: int


def seed_model(seed: int, iteration: int, rank: int) -> None:
    """Seed all random generators of this process, all devices', for one iteration."""
    torch_seed = _seed_cpu(_MODEL, seed, iteration, rank)
    if torch.accelerator.is_available():
        torch.manual_seed(torch_seed)
    else:  # torch notes a stack trace for each device that may come
        torch.default_generator.manual_seed(torch_seed)


def seed_sample(seed: int, place: Place) -> None:
    """Seed the random generators of transforms; a device's are left alone."""
    torch_seed = _seed_cpu(_DATA, seed, place.epoch, place.position)
    torch.default_generator.manual_seed(torch_seed)


def _seed_cpu(*key: int) -> int:
    """Seed Python's and numpy's generators; returns a seed for torch's."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    # torch's generator takes the lower 32 bits of a seed: the hash has mixed the key
    # into each word.
    return int(words[0])


class SeededDataset(Dataset):
    """A dataset in which a sample's random transforms depend on its place alone.

    Everything but the drawing of samples reaches the dataset inside, so hooks may read
    and set its attributes, ``pipeline`` for example.
    """

    _own = ("_dataset", "_seed")

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, place: Place) -> Any:
        seed_sample(self._seed, place)
        return self._dataset[place.index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        # Unpickling looks for methods before there is a dataset to ask, and torch for
        # __getitems__, which would go around the seeding.
        if name in self._own or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            super().__setattr__(name, value)
        else:
            setattr(self._dataset, name, value)


class PlacedBatchSampler(Sampler[list[Place]]):
    """Batches that know their place, beginning at any of them.

    Attributes that it does not have are those of the batch sampler inside, which yields
    the indices of this process alone. ``endless`` begins a new epoch after each, as
    iteration-based training does; if there is no batch then, OptionError is raised.
    """

    def __init__(
        self,
        batch_sampler: BatchSampler,
        rank: int,
        world_size: int,
        endless: bool = False,
    ) -> None:
        self.batch_sampler = batch_sampler
        self.rank = rank
        self.world_size = world_size
        self.endless = endless
        self.epoch = 0
        self._skip = 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def begin(self, epoch: int = 0, skip: int = 0) -> None:
        """Let the next iteration leave out batches, whose samples are not loaded."""
        self.epoch = epoch
        self._skip = skip

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, skip = self.epoch, self._skip
        self._skip = 0
        while True:
            count = 0
            for batch in self.batch_sampler:
                if skip > 0:
                    skip -= 1
                else:
                    # Samplers deal the line of samples to the processes in turn:
                    # numbered along that line, a sample is augmented alike however
                    # many processes there are.
                    yield [
                        Place(index, epoch, number * self.world_size + self.rank)
                        for number, index in enumerate(batch, count)
                    ]
                count += len(batch)
            if not self.endless:
                return
            if count == 0:
                raise OptionError(
                    "the training data has no batch: give it more images, or a smaller "
                    "batch_size if drop_last is set"
                )
            epoch += 1
            sampler = getattr(self.batch_sampler, "sampler", None)
            if hasattr(sampler, "set_epoch"):  # another order in every pass
                sampler.set_epoch(epoch)


def place_batches(
    dataloader: DataLoader, batch_sampler: PlacedBatchSampler, seed: int
) -> DataLoader:
    """A copy of a dataloader whose samples are seeded by their place."""
    placed = copy.copy(dataloader)
    # torch refuses to set these because a dataloader would still hold a sampler made
    # from the former ones. Here they wrap the former ones.
    vars(placed).update(
        dataset=SeededDataset(dataloader.dataset, seed),
        batch_sampler=batch_sampler,
        _iterator=None,
    )
    return placed


class BatchStream:
    """What iteration-based training draws its batches from.

    Takes the place of MMEngine's iterator, which would load what it skips, and start
    its workers anew in every epoch. The dataloader is of an endless
    :class:`PlacedBatchSampler`.
    """

    def __init__(self, dataloader: DataLoader) -> None:
        self._dataloader = dataloader
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self._dataloader)
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Begin after this many batches. MMEngine calls it when it resumes."""
        self._dataloader.batch_sampler.begin(skip=num_iters)
        self._iterator = None
