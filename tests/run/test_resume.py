"""Resume: killed for good and gone on with, training ends with the same bits.

Processes are killed by SIGKILL, in the middle of an epoch and in the middle of saving.
"""

import os
import re
import resource
import shutil
import signal
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmcastling.checkpoint import CheckpointError, load_checkpoint
from mmcastling.run import load_config, train
from mmcastling.run.training import newest_usable, settle_start

# Kills its own process, after an iteration or while the checkpoint of that is written.
# Workers go first, as when a scheduler kills: orphans with large samples to hand over
# wait for ever, and keep the pipe open that this test reads.
KILL_HOOK = """
import multiprocessing
import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


def kill(*arguments):
    for worker in multiprocessing.active_children():
        worker.kill()
    os.kill(os.getpid(), signal.SIGKILL)


@HOOKS.register_module()
class KillHook(Hook):
    priority = "LOWEST"

    def __init__(self, after=-1, saving=False):
        self.after = after
        self.saving = saving

    def before_save_checkpoint(self, runner, checkpoint):
        if self.saving and runner.iter + 1 == self.after:
            os.fsync = kill  # all is written, but it has not got its name

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.saving and runner.iter + 1 == self.after:
            kill()
"""

# Epochs of 4 batches, saved every 5: inside epochs, and inside windows of 3 gradients.
CLASSIFIER = """
_base_ = [{base!r}]
custom_imports = dict(imports=["mmcastling", "kill_hook"])
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomResizedCrop", scale=64),
            dict(type="RandomFlip", prob=0.5),
            dict(type="ColorJitter", brightness=0.4, contrast=0.4),
            dict(type="PackInputs"),
        ]
    ),
)
model = dict(
    backbone=dict(drop_path_rate=0.3),
    train_cfg=dict(_delete_=True, augments=[dict(type="Mixup", alpha=0.8)]),
)
optim_wrapper = dict(
    accumulative_counts=3,
    constructor="mmcastling.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.7),
)
train_cfg = dict(max_epochs=3, val_interval=2)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=20, by_epoch=False)]
randomness = dict(seed=0)
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(by_epoch=False, interval=5, max_keep_ckpts=2),
)
custom_hooks = [
    dict(type="KillHook"),
    dict(type="MaskDecayHook", begin=0.2, finish=0.9, interval=1),
    dict(type="EMAHook", momentum=0.2),
]
"""

# Iterations of 2 images; RPN and RoI heads sample at random.
DETECTOR = """
_base_ = [{base!r}]
custom_imports = dict(imports=["mmcastling", "kill_hook"])
train_dataloader = dict(
    num_workers=1,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(type="RandomResize", scale=(128, 128), ratio_range=(0.7, 1.5)),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackDetInputs"),
        ]
    ),
)
train_cfg = dict(max_iters=5)
val_dataloader = val_cfg = val_evaluator = None
default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=-1))
custom_hooks = [
    dict(type="KillHook"),
    dict(
        type="MaskDecayHook", mode="weight", start="0.5/N", finish=0.9, interval=1
    ),
    dict(type="EMAHook", momentum=0.2),
]
"""


@pytest.fixture(scope="module")
def make(tmp_path_factory, run_command):
    """Write a config with a KillHook; returns it and what trains it in a process."""

    def write(text, base):
        folder = tmp_path_factory.mktemp("killed")
        (folder / "kill_hook.py").write_text(textwrap.dedent(KILL_HOOK))
        (folder / "config.py").write_text(text.format(base=str(base)))

        def run(work_dir, *arguments, **options):
            if options:
                pairs = (f"{key}={value}" for key, value in options.items())
                arguments += ("--cfg-options", *pairs)
            return run_command(
                *("train.py", folder / "config.py", "--work-dir", work_dir),
                *arguments,
                PYTHONPATH=str(folder),
                OMP_NUM_THREADS="1",
            )

        def killed(name, after, saving=False, **options):
            options |= {"custom_hooks.0.after": after, "custom_hooks.0.saving": saving}
            assert run(folder / name, **options).returncode == -signal.SIGKILL
            return folder / name

        def finished(name, *arguments):
            process = run(folder / name, *arguments)
            assert process.returncode == 0, process.stderr[-3000:]
            return load_checkpoint(last_of(folder / name))

        return SimpleNamespace(folder=folder, killed=killed, finished=finished)

    return write


def last_of(work_dir):
    return (work_dir / "last_checkpoint").read_text()


def names(work_dir):
    return sorted(path.name for path in work_dir.iterdir() if "iter_" in path.name)


def log_of(work_dir):
    return "".join(path.read_text() for path in sorted(work_dir.glob("*/*.log")))


def train_here(folder, name, resume=None, **options):
    """Train in this process, without workers, which make no difference."""
    options |= {
        "train_dataloader.num_workers": 0,
        "train_dataloader.persistent_workers": False,
    }
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        cfg = load_config(folder / "config.py", options, work_dir=str(folder / name))
    torch.set_num_threads(1)  # as the processes have
    try:
        train(cfg, resume=resume)
    finally:
        torch.set_num_threads(threads)
    return load_checkpoint(last_of(folder / name))


@pytest.fixture(scope="module")
def classifier(make, classifier_config):
    """The classifier, trained to its end, and killed in its third epoch."""
    run = make(CLASSIFIER, classifier_config)
    run.whole = train_here(run.folder, "whole")
    run.killed("inside", after=11)
    shutil.copytree(run.folder / "inside", run.folder / "cut")
    return run


@pytest.mark.slow
def test_killed_inside_an_epoch(classifier, assert_same_training):
    work_dir = classifier.folder / "inside"
    assert names(work_dir) == ["iter_10.pth", "iter_5.pth"]
    assert load_checkpoint(last_of(work_dir))["meta"]["epoch"] == 2
    resumed = classifier.finished("inside", "--resume")
    assert_same_training(classifier.whole, resumed)
    # Hooks are told the place in the epoch, so that its first line is that of batch 3.
    log = log_of(work_dir)
    steps = re.findall(r"Epoch\(train\) +\[(\d)\]\[(\d)/4\]", log)
    assert steps == [*zip("1111222233333", "1234123412334", strict=True)]
    assert "restored the gradients of the unfinished accumulation" in log
    groups = resumed["optimizer"]["param_groups"]
    assert len({group["lr"] for group in groups}) > 2  # of the layer decay


@pytest.mark.slow
def test_a_truncated_checkpoint_is_passed_over(classifier, assert_same_training):
    work_dir = classifier.folder / "cut"
    newest, before = work_dir / "iter_10.pth", work_dir / "iter_5.pth"
    newest.write_bytes(newest.read_bytes()[:-1000])
    (work_dir / "last_checkpoint").write_text(str(newest))
    resumed = train_here(classifier.folder, "cut", resume="auto")
    assert_same_training(classifier.whole, resumed)
    (line,) = [line for line in log_of(work_dir).splitlines() if "instead" in line]
    assert "WARNING" in line
    assert re.search(
        rf"{newest} \(\d+ bytes\) is truncated.*Resuming from {before} instead", line
    )


@pytest.mark.slow
def test_killed_while_saving(classifier, assert_same_training):
    one = {"default_hooks.checkpoint.max_keep_ckpts": 1}
    work_dir = classifier.killed("saving", after=10, saving=True, **one)
    last, unfinished = sorted(names(work_dir), key=len)
    # Although only one is kept, the former one is still there.
    assert last == "iter_5.pth" and last_of(work_dir).endswith(last)
    assert unfinished.startswith(".iter_10.pth.")
    resumed = train_here(classifier.folder, "saving", resume="auto", **one)
    assert_same_training(classifier.whole, resumed)
    assert names(work_dir) == ["iter_12.pth"]
    assert f"{unfinished}, which a kill left unfinished" in log_of(work_dir)


@pytest.mark.slow
def test_a_detector_killed_between_checkpoints(
    make, detector_config, assert_same_training
):
    run = make(DETECTOR, detector_config)
    whole = train_here(run.folder, "whole")
    work_dir = run.killed("killed", after=3)
    assert names(work_dir) == ["iter_2.pth"]
    resumed = train_here(run.folder, "killed", resume=str(work_dir / "iter_2.pth"))
    assert_same_training(whole, resumed)
    assert whole["ema_state_dict"]


@pytest.mark.slow
def test_a_full_disk_ends_training_with_one_line(classifier_config, run_main, tmp_path):
    work_dir = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        result = run_main("train.py", classifier_config, "--work-dir", work_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert line == (
        f"error: cannot write {work_dir / 'epoch_1.pth'}: [Errno 27] File too large; "
        "what was saved before is untouched"
    )
    assert [path.suffix for path in work_dir.iterdir() if path.is_file()] == [".py"]


# -- which checkpoint it is ------------------------------------------------------------


def checkpoint(path, step=1, **changes):
    content = dict(
        state_dict={"weight": torch.ones(2)},
        optimizer={"step": step},
        message_hub={"x": 1},
        meta=dict(iter=step),
    )
    torch.save(content | changes, path)
    os.utime(path, (step, step))
    return path


def test_an_empty_folder_or_none_starts_anew(tmp_path):
    assert newest_usable(str(tmp_path)) is None
    assert newest_usable(str(tmp_path / "none")) is None


def test_the_named_one_comes_first(tmp_path):
    one, _ = (checkpoint(tmp_path / f"iter_{i}.pth", i) for i in (1, 2))
    (tmp_path / "last_checkpoint").write_text(f"{one}\n")
    start = newest_usable(str(tmp_path))
    assert (start.source, start.warnings) == (str(one), [])


@pytest.mark.parametrize("text", [None, "", "  \n"])
def test_without_a_name_the_newest_comes_first(text, tmp_path):
    for i in (9, 10):
        checkpoint(tmp_path / f"iter_{i}.pth", i)
    checkpoint(tmp_path / "best_acc_iter_11.pth", 11, optimizer=None)
    checkpoint(tmp_path / "castled.pth", 12, meta=dict(deploy=True))
    (tmp_path / ".iter_13.pth.x.mmcastling-tmp").write_bytes(b"half")
    if text is not None:
        (tmp_path / "last_checkpoint").write_text(text)
    assert newest_usable(str(tmp_path)).source == str(tmp_path / "iter_10.pth")


def test_files_copied_together_are_told_by_their_numbers(tmp_path):
    for i in (9, 10):
        os.utime(checkpoint(tmp_path / f"iter_{i}.pth", i), (5, 5))
    assert newest_usable(str(tmp_path)).source == str(tmp_path / "iter_10.pth")


def test_every_damaged_one_is_named(tmp_path):
    one, two, three = (checkpoint(tmp_path / f"iter_{i}.pth", i) for i in (1, 2, 3))
    (tmp_path / "last_checkpoint").write_text(str(three))
    three.write_bytes(b"")
    two.write_bytes(two.read_bytes()[:200])
    start = newest_usable(str(tmp_path))
    assert start.source == str(one)
    assert len(start.warnings) == 2
    for path, warning in zip((three, two), start.warnings, strict=True):
        assert f"checkpoint {path} (" in warning
        assert warning.endswith(f"Resuming from {one} instead")


def test_a_named_one_that_is_gone_is_passed_over(tmp_path):
    one = checkpoint(tmp_path / "iter_1.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_2.pth"))
    start = newest_usable(str(tmp_path))
    assert start.source == str(one)
    assert "iter_2.pth, which last_checkpoint names, is missing" in start.warnings[0]


def test_a_work_dir_that_was_moved_is_found(tmp_path):
    (tmp_path / "new").mkdir()
    one = checkpoint(tmp_path / "new" / "iter_1.pth")
    (one.parent / "last_checkpoint").write_text(str(tmp_path / "old" / "iter_1.pth"))
    start = newest_usable(str(one.parent))
    assert (start.source, start.warnings) == (str(one), [])


def test_nothing_usable_is_an_error_with_all_names(tmp_path):
    for i in (1, 2):
        checkpoint(tmp_path / f"iter_{i}.pth", i).write_bytes(b"PK")
    with pytest.raises(CheckpointError) as caught:
        newest_usable(str(tmp_path))
    for part in ("iter_1.pth (2 bytes)", "iter_2.pth (2 bytes)", "without --resume"):
        assert part in str(caught.value)


def test_one_that_asks_to_run_code_is_not_passed_over(attack, tmp_path):
    checkpoint(tmp_path / "iter_1.pth")
    (tmp_path / "last_checkpoint").write_text(str(attack.path))
    with pytest.raises(CheckpointError, match="is refused: it asks to run code"):
        newest_usable(str(tmp_path))
    assert not attack.trace.exists()


# -- what is checked before anything is written ----------------------------------------


@pytest.mark.slow
def test_another_architecture_is_refused_before_anything_is_written(
    trained_classifier, tmp_path
):
    options = {"model.backbone.arch": "tiny", "model.head.in_channels": 192}
    cfg = load_config(
        trained_classifier.config, options, work_dir=str(tmp_path / "run")
    )
    cfg.resume, cfg.load_from = True, str(trained_classifier.masks_on)
    with pytest.raises(CheckpointError) as caught:
        settle_start(cfg)
    for part in (
        "epoch_1.pth is of another architecture",
        "missing backbone.layers.4.",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_without_a_seed_gets_that_of_the_checkpoint(trained_classifier, tmp_path):
    shutil.copy(trained_classifier.masks_on, tmp_path / "epoch_1.pth")
    seed = load_checkpoint(trained_classifier.masks_on)["meta"]["seed"]
    cfg = load_config(trained_classifier.config, work_dir=str(tmp_path))
    cfg.resume = True
    assert cfg.get("randomness", {}).get("seed") is None
    assert settle_start(cfg) == []
    assert cfg.randomness.seed == seed
    assert cfg.load_from == str(tmp_path / "epoch_1.pth")


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "configs").glob("*.py")),
    ids=lambda path: path.stem,
)
@pytest.mark.long
def test_every_config_can_be_resumed_exactly(path):
    hooks = load_config(path).default_hooks
    assert hooks.checkpoint.type == "AtomicCheckpointHook"
    assert hooks.exact_resume.type == "ExactResumeHook"
