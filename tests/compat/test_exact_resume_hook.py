"""ExactResumeHook: interrupted and resumed, training ends with the same bits."""

import random

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset

import mmcastling  # noqa: F401, before any toolbox
from mmcastling.attention import Attention
from mmcastling.checkpoint import load_checkpoint
from mmcastling.compat.exact_resume_hook import GRADIENTS_KEY
from mmcastling.compat.seeded_data import (
    Place,
    PlacedBatchSampler,
    SeededDataset,
    place_batches,
    seed_model,
    seed_sample,
)
from mmcastling.train import ExactResumeHook


def draws():
    """One number of each generator that transforms and models use."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@DATASETS.register_module()
class Jittered(Dataset):
    """Eleven "images", each drawn anew with all three random generators."""

    pipeline = "first"

    def __len__(self):
        return 11

    def get_data_info(self, index):
        return dict(width=10 + index % 3, height=11)

    def __getitem__(self, index):
        tokens = torch.full((6, 8), float(index)) / 11
        return {"inputs": tokens + torch.tensor(draws()).sum() + torch.randn(6, 8)}


class Noisy(BaseModel):
    """An attention, batch statistics, dropout, and a sampler as detectors have one."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(8, 2)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs, mode="tensor"):
        x = torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs
        x = self.drop(self.norm(self.attention(x)))
        chosen = np.random.permutation(6)[:3]
        return {"loss": (x[:, chosen] - random.random()).square().mean()}


class Killed(BaseException):
    """Not caught by anything, as SIGKILL is not."""


class KillHook(Hook):
    priority = "LOWEST"

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            raise Killed


class Batches(Hook):
    """Notes what every iteration was told, and the data it got."""

    def __init__(self):
        self.seen = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        sums = [float(sample.sum()) for sample in data_batch["inputs"]]
        self.seen[runner.iter] = (batch_idx, sums)


def run(
    folder,
    *,
    epochs=None,
    sampler="DefaultSampler",
    aspect=False,
    workers=0,
    counts=1,
    interval=1,
    by_epoch=False,
    kill=None,
    resume=False,
    exact=True,
    seed=0,
    batch_size=2,
    hooks=(),
):
    """Train :class:`Noisy` for 12 iterations of 2, or epochs of 6; returns the end."""
    loader = dict(
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers == 2,
        dataset=dict(type="Jittered"),
        sampler=dict(type=sampler, shuffle=True),
    )
    if aspect:
        loader["batch_sampler"] = dict(type="mmdet.AspectRatioBatchSampler")
    default = {"checkpoint": dict(type="AtomicCheckpointHook")}
    if exact:
        default["exact_resume"] = dict(type="ExactResumeHook")
    default["checkpoint"] |= dict(interval=interval, by_epoch=by_epoch)
    torch.manual_seed(0)
    np.random.seed(0)
    runner = Runner(
        Noisy(),
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs)
        if epochs
        else dict(by_epoch=False, max_iters=12),
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=0.01), accumulative_counts=counts
        ),
        param_scheduler=dict(type="CosineAnnealingLR", T_max=12, by_epoch=False),
        default_hooks=default,
        custom_hooks=[
            dict(type="EMAHook", momentum=0.3),
            dict(type="MaskDecayHook", mode="weight", interval=1),
            *([KillHook(kill)] if kill else []),
            *hooks,
        ],
        randomness=dict(seed=seed),
        resume=resume,
        experiment_name=f"{folder.name}_{random.SystemRandom().random()}",
        log_level="WARNING",
        default_scope="mmengine",
    )
    try:
        runner.train()
    except Killed:
        return None
    finally:
        end_workers(runner.train_loop)
    return load_checkpoint((folder / "last_checkpoint").read_text())


def end_workers(loop):
    """What the end of a process does; garbage collection takes 5 seconds for each."""
    stream = getattr(loop, "dataloader_iterator", loop.dataloader)
    if shut_down := getattr(stream._iterator, "_shutdown_workers", None):
        shut_down()


def differ(one, other):
    weights = one["state_dict"], other["state_dict"]
    return any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


CASES = {
    "iterations, infinite": dict(sampler="InfiniteSampler"),
    "iterations, passes of 6": dict(workers=2),
    "iterations, pairs of one shape": dict(aspect=True),
    "epochs": dict(epochs=2),
    "epochs, persistent workers": dict(epochs=2, workers=2),
    "epochs, new workers, pairs of one shape": dict(epochs=2, workers=1, aspect=True),
    "accumulated gradients": dict(counts=3),
    "accumulated gradients, epochs": dict(epochs=2, counts=5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_resumed_run_ends_with_the_same_bits(case, assert_same_training, tmp_path):
    whole_batches, batches = Batches(), Batches()
    whole = run(tmp_path / "whole", hooks=[whole_batches], **case)
    # The second pass has begun when the first kill comes, 8 = 6 + 2.
    run(tmp_path / "cut", interval=4, kill=9, **case)
    assert (tmp_path / "cut" / "last_checkpoint").read_text().endswith("iter_8.pth")
    resumed = run(tmp_path / "cut", resume=True, hooks=[batches], **case)
    assert_same_training(whole, resumed)
    assert set(batches.seen) == {8, 9, 10, 11}
    assert batches.seen == {i: whole_batches.seen[i] for i in batches.seen}
    assert GRADIENTS_KEY not in whole  # not at the end of a window


@pytest.mark.parametrize("kill", [4, 6, 7])
def test_the_place_of_the_kill_makes_no_difference(
    kill, assert_same_training, tmp_path
):
    # 6 is the end of an epoch: its last checkpoint lies inside it.
    case = dict(epochs=2, counts=4)
    whole = run(tmp_path / "whole", hooks=[expected := Batches()], **case)
    run(tmp_path / "cut", kill=kill, **case)
    run(tmp_path / "cut", kill=10, resume=True, hooks=[batches := Batches()], **case)
    assert batches.seen == {i: expected.seen[i] for i in range(kill, 10)}
    assert_same_training(whole, run(tmp_path / "cut", resume=True, **case))


def test_checkpoints_by_epoch(assert_same_training, tmp_path):
    whole = run(tmp_path / "whole", epochs=2, by_epoch=True)
    run(tmp_path / "cut", epochs=2, by_epoch=True, kill=9)
    resumed = run(tmp_path / "cut", epochs=2, by_epoch=True, resume=True)
    assert_same_training(whole, resumed)


def test_the_number_of_workers_makes_no_difference(assert_same_training, tmp_path):
    runs = [run(tmp_path / str(n), workers=n, epochs=2) for n in (0, 1, 2)]
    assert_same_training(runs[0], runs[1])
    assert_same_training(runs[0], runs[2])


@pytest.mark.parametrize("case", [dict(sampler="InfiniteSampler"), dict(epochs=2)])
def test_without_the_hook_the_weights_differ(case, tmp_path):
    case = dict(exact=False, **case)
    whole = run(tmp_path / "whole", **case)
    assert not differ(whole, run(tmp_path / "again", **case))
    run(tmp_path / "cut", kill=8, **case)
    assert differ(whole, run(tmp_path / "cut", resume=True, **case))


def test_only_a_window_of_accumulation_is_stored(tmp_path):
    run(tmp_path, counts=4)
    stored = {
        i: GRADIENTS_KEY in load_checkpoint(tmp_path / f"iter_{i}.pth")
        for i in range(1, 13)
    }
    assert stored == {i: i % 4 != 0 for i in range(1, 13)}


def test_iterations_and_samples_are_drawn_differently(tmp_path):
    batches = Batches()
    run(tmp_path, hooks=[batches])
    sums = [value for _, pair in batches.seen.values() for value in pair]
    assert len(set(sums)) == len(sums)


def test_another_seed_is_another_run(tmp_path):
    one, other = (run(tmp_path / str(s), seed=s) for s in (0, 1))
    assert differ(one, other)


# -- what is not the same run ----------------------------------------------------------


def test_an_order_of_data_of_another_seed_is_an_error(tmp_path):
    run(tmp_path, kill=4, seed=3)
    with pytest.raises(ValueError, match=r"seed 3 .* seed 5: set .*seed=3"):
        run(tmp_path, resume=True, seed=5)


def test_another_batch_size_is_a_warning(tmp_path):
    run(tmp_path, kill=4)
    run(tmp_path, resume=True, batch_size=4, hooks=[log := Warnings()])
    (message,) = [text for text in log.texts if "batch_size" in text]
    assert "batch_size=4, trained before with 2" in message


class Warnings(Hook):
    """Collects the warnings of a run."""

    def __init__(self):
        self.texts = []

    def before_run(self, runner):
        runner.logger.warning = self.texts.append


def test_a_loop_of_another_kind_is_an_error():
    class Loop:
        iter = 0

    class OfAnotherLoop:
        train_loop = Loop()

    with pytest.raises(ValueError, match="does not know where Loop draws"):
        ExactResumeHook().before_train(OfAnotherLoop())


# -- the data --------------------------------------------------------------------------


def test_a_sample_depends_on_its_place_alone():
    data = SeededDataset(Jittered(), seed=0)
    first = data[Place(3, 0, 7)]["inputs"]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert torch.equal(first, data[Place(3, 0, 7)]["inputs"])
    for other in (Place(3, 1, 7), Place(3, 0, 8), Place(4, 0, 7)):
        assert not torch.equal(first, data[other]["inputs"])
    assert not torch.equal(
        first, SeededDataset(Jittered(), seed=1)[Place(3, 0, 7)]["inputs"]
    )


def test_every_generator_is_seeded_and_each_key_counts():
    def after(seed, *key):
        seed(*key)
        return draws()

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    model = [after(seed_model, *key) for key in keys]
    data = [after(seed_sample, seed, Place(0, *rest)) for seed, *rest in keys]
    for column in zip(*model, strict=True):
        assert len(set(column)) == len(keys)
    assert len({*model, *data}) == 2 * len(keys)
    assert model == [after(seed_model, *key) for key in keys]


def test_hooks_reach_the_dataset_inside():
    inner = Jittered()
    data = SeededDataset(inner, seed=0)
    data.pipeline = "second"
    assert (inner.pipeline, data.pipeline, len(data)) == ("second", "second", 11)
    with pytest.raises(AttributeError):
        data.nothing  # noqa: B018


def test_positions_are_those_of_one_process_with_the_whole_batch():
    def places(rank, world_size, batch):
        share = list(range(12))[rank::world_size]
        loader = DataLoader(Jittered(), batch_size=batch, sampler=share)
        sampler = PlacedBatchSampler(loader.batch_sampler, rank, world_size)
        return list(sampler)

    halves = places(0, 2, 2), places(1, 2, 2)
    for whole, *parts in zip(places(0, 1, 4), *halves, strict=True):
        assert set(whole) == {place for part in parts for place in part}


def test_skipped_batches_are_not_loaded():
    class Counted(Jittered):
        loaded = 0

        def __getitem__(self, index):
            self.loaded += 1
            return super().__getitem__(index)

    data = Counted()
    loader = DataLoader(data, batch_size=2)
    sampler = PlacedBatchSampler(loader.batch_sampler, 0, 1)
    placed = place_batches(loader, sampler, seed=0)
    sampler.begin(epoch=0, skip=4)
    rest = [batch["inputs"] for batch in placed]
    assert (len(rest), data.loaded) == (2, 3)
    every = [batch["inputs"] for batch in placed]
    assert len(every) == 6
    assert all(map(torch.equal, rest, every[4:]))


def test_an_endless_pass_over_nothing_ends():
    with pytest.raises(ValueError, match="has no batch"):
        next(iter(PlacedBatchSampler([], 0, 1, endless=True)))
