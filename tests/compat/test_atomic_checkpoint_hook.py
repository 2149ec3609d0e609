"""AtomicCheckpointHook: whatever happens while saving, a whole checkpoint is left."""

import errno
import os
import random
import resource
import shutil

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from mmcastling.checkpoint import CheckpointError, load_checkpoint
from mmcastling.files import write_atomically


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs, mode="tensor"):
        x = self.layer(torch.stack(inputs))
        return {"loss": x.square().mean()} if mode == "loss" else [0]


class Rising(BaseMetric):
    """A metric that is better every time, so each checkpoint becomes the best."""

    count = 0

    def process(self, data_batch, data_samples):
        self.results.append(0.0)

    def compute_metrics(self, results):
        Rising.count += 1
        return {"acc": Rising.count}


class Files(Hook):
    """Notes the checkpoints that can be loaded at the moment of saving another."""

    def __init__(self):
        self.whole = []

    def before_save_checkpoint(self, runner, checkpoint):
        found = sorted(os.listdir(runner.work_dir))
        names = [name for name in found if name.endswith(".pth")]
        for name in names:
            load_checkpoint(os.path.join(runner.work_dir, name))
        self.whole.append(names)


def run(
    folder,
    *hooks,
    kind="AtomicCheckpointHook",
    validate=False,
    resume=None,
    iterations=3,
    **options,
):
    data = [{"inputs": torch.randn(2)} for _ in range(4)]
    val = {}
    if validate:
        val = dict(
            val_dataloader=DataLoader(data, collate_fn=stacked),
            val_cfg=dict(),
            val_evaluator=Evaluator([Rising()]),
        )
    checkpoint = dict(type=kind, by_epoch=False, interval=1, **options)
    Runner(
        Toy(),
        work_dir=str(folder),
        train_dataloader=DataLoader(data, sampler=range(4), collate_fn=stacked),
        train_cfg=dict(by_epoch=False, max_iters=iterations, val_interval=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint=checkpoint),
        custom_hooks=list(hooks),
        load_from=resume,
        resume=resume is not None,
        experiment_name=f"{folder.name}_{random.SystemRandom().random()}",
        log_level="ERROR",
        default_scope="mmengine",
        **val,
    ).train()
    return files_of(folder)


def files_of(folder):
    """Names of the files in a work directory, its config left out."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return sorted(path.name for path in files if path.suffix != ".py")


def stacked(samples):
    return {"inputs": [sample["inputs"] for sample in samples]}


def test_an_outdated_checkpoint_is_removed_after_the_new_one_is_whole(tmp_path):
    files = Files()
    left = run(tmp_path / "ours", files, max_keep_ckpts=1)
    assert left == ["iter_3.pth", "last_checkpoint"]
    assert files.whole == [[], ["iter_1.pth"], ["iter_2.pth"]]
    # MMEngine's own leaves a moment with none.
    files = Files()
    run(tmp_path / "mmengine", files, kind="CheckpointHook", max_keep_ckpts=1)
    assert files.whole == [[], [], []]


def test_so_is_the_former_best(tmp_path):
    files = Files()
    left = run(
        tmp_path,
        files,
        validate=True,
        max_keep_ckpts=1,
        save_best="acc",
        rule="greater",
    )
    assert left == ["best_acc_iter_3.pth", "iter_3.pth", "last_checkpoint"]
    best = [[name for name in names if "best" in name] for names in files.whole]
    assert all(len(names) >= 1 for names in best[2:])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (-1, ["iter_1.pth", "iter_2.pth", "iter_3.pth"]),
        (2, ["iter_2.pth", "iter_3.pth"]),
    ],
)
def test_as_many_are_kept_as_asked(keep, expected, tmp_path):
    left = run(tmp_path, max_keep_ckpts=keep)
    assert left == [*expected, "last_checkpoint"]
    last = (tmp_path / "last_checkpoint").read_text()
    assert last == str(tmp_path / "iter_3.pth")
    kept = load_checkpoint(last)["message_hub"]["runtime_info"]
    assert kept["last_ckpt"] == last
    assert kept.get("keep_ckpt_ids", [1, 2, 3][-keep:]) == [1, 2, 3][-keep:]


class FullDisk(Hook):
    """From an iteration on, a file reaches the disk only in part."""

    def __init__(self, iteration, monkeypatch):
        self.iteration = iteration
        self.monkeypatch = monkeypatch

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter + 1 == self.iteration:

            def fsync(descriptor):
                raise OSError(errno.ENOSPC, "No space left on device")

            self.monkeypatch.setattr(os, "fsync", fsync)


class SmallFiles(Hook):
    """From an iteration on, the system ends files after 512 bytes."""

    def __init__(self, iteration):
        self.iteration = iteration
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter + 1 == self.iteration:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, self.before[1]))


@pytest.mark.parametrize("how", ["no space", "limit of the system"])
def test_a_full_disk_is_an_error_with_the_name(how, tmp_path, monkeypatch):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    hook = FullDisk(2, monkeypatch) if how == "no space" else SmallFiles(2)
    try:
        with pytest.raises(CheckpointError) as caught:
            run(tmp_path, hook, max_keep_ckpts=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"cannot write {tmp_path / 'iter_2.pth'}" in str(caught.value)
    expected = "No space left" if how == "no space" else "File too large"
    assert expected in str(caught.value)
    # Neither half a file nor the loss of the former one.
    assert files_of(tmp_path) == ["iter_1.pth", "last_checkpoint"]
    assert load_checkpoint(tmp_path / "iter_1.pth")["meta"]["iter"] == 1
    assert (tmp_path / "last_checkpoint").read_text().endswith("iter_1.pth")


def test_other_files_of_mmengine_are_written_as_ever(tmp_path):
    run(tmp_path)
    assert type(get_file_backend(tmp_path)) is LocalBackend


def test_what_a_kill_left_unfinished_is_removed_at_the_next_start(tmp_path):
    (tmp_path / ".iter_9.pth.abc.mmcastling-tmp").write_bytes(b"half")
    (tmp_path / ".other.tmp").write_bytes(b"of somebody else")
    assert run(tmp_path, max_keep_ckpts=1) == [
        ".other.tmp",
        "iter_3.pth",
        "last_checkpoint",
    ]


def test_the_name_of_the_newest_is_replaced_whole(tmp_path):
    former, name = tmp_path / "former.py", tmp_path / "last_checkpoint"
    former.write_text("of another run")
    name.hardlink_to(former)  # writing into the file would change both
    run(tmp_path)
    assert name.read_text() == str(tmp_path / "iter_3.pth")
    assert former.read_text() == "of another run"


def test_a_copy_of_a_run_keeps_to_its_own_folder(tmp_path):
    ours, copied = tmp_path / "ours", tmp_path / "copied"
    options = dict(validate=True, max_keep_ckpts=1, save_best="acc", rule="greater")
    run(ours, **options)
    shutil.copytree(ours, copied)
    before = files_of(ours)
    run(copied, resume=str(copied / "iter_3.pth"), iterations=4, **options)
    assert files_of(ours) == before
    assert files_of(copied) == ["best_acc_iter_4.pth", "iter_4.pth", "last_checkpoint"]


def test_a_checkpoint_that_another_process_is_saving_stays(tmp_path):
    writing = tmp_path / "run" / "iter_9.pth"
    writing.parent.mkdir()

    def save(file):
        before = set(os.listdir(writing.parent))
        run(writing.parent, max_keep_ckpts=1)
        assert before <= set(os.listdir(writing.parent))

    write_atomically(writing, save)
    assert writing.is_file()
