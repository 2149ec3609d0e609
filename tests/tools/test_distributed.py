"""Two processes on this machine, over gloo: what one process would have done."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from mmcastling.checkpoint import load_checkpoint
from mmcastling.deploy import select_weights
from mmcastling.run import convert, evaluate, load_config, train

pytestmark = [pytest.mark.slow, pytest.mark.long]

# Writes down, in each process, what an iteration saw and what training ended with.
RECORDER = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmcastling.verbs import castling_modules


@HOOKS.register_module(force=True)
class Recorder(Hook):
    priority = "LOWEST"

    def __init__(self):
        self.iterations = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        scalars = runner.message_hub.log_scalars
        self.iterations.append(
            dict(
                loss=outputs["loss"].item(),
                masks=[
                    (str(module.branch.threshold), module.branch.weight)
                    for _, module in castling_modules(runner.model)
                ],
                log={
                    name: float(scalars[name].current())
                    for name in scalars
                    if name.startswith("train/mask_")
                },
            )
        )

    def after_train(self, runner):
        weights = {
            name.removeprefix("module."): value
            for name, value in runner.model.state_dict().items()
        }
        path = f"{runner.work_dir}/rank{get_rank()}.pth"
        torch.save(dict(iterations=self.iterations, weights=weights), path)


@HOOKS.register_module(force=True)
class Failure(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1 and get_rank() == 1:
            raise ValueError("picture 7 cannot be read")
"""

# Layer norms and a mean over images: two halves of a batch average to the whole. The
# branch goes off in the third of six iterations.
CONFIG = """
_base_ = [{base!r}]
custom_imports = dict(
    imports=["mmcastling", "recorder"], allow_failed_imports=False
)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True, type="SGD", lr=0.1, momentum=0.9, weight_decay=0.05
    ),
    clip_grad=dict(max_norm=0.5),
    constructor="mmcastling.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.7),
)
train_cfg = dict(max_epochs=3)
randomness = dict(seed=3)
custom_hooks = [
    dict(type="MaskDecayHook", start="1/N", begin=0, finish=0.4, interval=1),
    dict(type="EMAHook", momentum=0.5),
    dict(type="Recorder"),
]
"""


@pytest.fixture(scope="module")
def config(classifier_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "recorder.py").write_text(RECORDER)
    path = folder / "classifier.py"
    path.write_text(CONFIG.format(base=str(classifier_config)))
    return path


@pytest.fixture(scope="module")
def run_script(root, warm_python, tmp_path_factory):
    """Run a script of ``tools/`` with two processes on the CPU.

    ``fresh`` starts Python anew in each; else they are forks, torchrun too.
    """
    torchrun = tmp_path_factory.mktemp("bin") / "torchrun"
    command = f'exec {warm_python} -m torch.distributed.run "$@"'
    torchrun.write_text(f"#!/bin/sh\n{command}\n")
    torchrun.chmod(0o755)

    def run(name, *arguments, cwd, path=(), fresh=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        programs = Path(sys.executable).parent if fresh else torchrun.parent
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(map(str, [*path, root])),
            "PORT": str(port),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        if not fresh:
            environment["PYTHON_EXEC"] = str(warm_python)  # of torchrun
        started = time.monotonic()
        done = subprocess.run(
            ["bash", str(root / "tools" / name), *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        done.seconds = time.monotonic() - started
        return done

    return run


@pytest.fixture(scope="module")
def trained_by_two(config, run_script, tmp_path_factory):
    """Two processes with batches of two, and one process with batches of four."""
    work_dir = tmp_path_factory.mktemp("two")
    done = run_script(
        *("dist_train.sh", config, 2, "--work-dir", work_dir),
        *("--cfg-options", "train_dataloader.batch_size=2"),
        cwd=work_dir,
        path=[config.parent],
        fresh=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(config.parent)
        train(load_config(config, work_dir=str(alone)))
    return SimpleNamespace(
        output=done.stdout + done.stderr,
        work_dir=work_dir,
        ranks=[torch.load(work_dir / f"rank{i}.pth") for i in range(2)],
        one=torch.load(alone / "rank0.pth"),
        checkpoint=load_checkpoint(work_dir / "epoch_3.pth"),
        checkpoint_of_one=load_checkpoint(alone / "epoch_3.pth"),
    )


def test_losses_average_to_those_of_the_doubled_batch(trained_by_two):
    losses = [
        [iteration["loss"] for iteration in run["iterations"]]
        for run in (*trained_by_two.ranks, trained_by_two.one)
    ]
    first, second, whole = map(torch.tensor, losses)
    assert len(whole) == 6
    assert (first - second).abs().max() > 1e-4  # they saw different images
    assert_close((first + second) / 2, whole, atol=1e-5, rtol=1e-5)


def test_weights_equal_those_of_the_doubled_batch(trained_by_two):
    first, second = (rank["weights"] for rank in trained_by_two.ranks)
    assert_close(first, second, atol=0, rtol=0)
    assert_close(first, trained_by_two.one["weights"], atol=1e-5, rtol=1e-4)


def test_checkpoints_hold_the_same_average_under_the_same_names(trained_by_two):
    two, one = trained_by_two.checkpoint, trained_by_two.checkpoint_of_one
    assert two["meta"]["mask_decay"] == one["meta"]["mask_decay"]
    for key in ("state_dict", "ema_state_dict"):
        assert_close(dict(two[key]), dict(one[key]), atol=1e-5, rtol=1e-4)


def test_masks_and_their_log_are_equal_in_all_processes(trained_by_two):
    first, second = (rank["iterations"] for rank in trained_by_two.ranks)
    for a, b, whole in zip(
        first, second, trained_by_two.one["iterations"], strict=True
    ):
        assert a["masks"] == b["masks"] == whole["masks"]
        assert a["log"] == b["log"]
        assert_close(a["log"], whole["log"], atol=1e-5, rtol=1e-4)
    densities = [iteration["log"]["train/mask_density"] for iteration in first]
    assert all(0.1 < density < 0.9 for density in densities[:1])
    assert densities[3:] == [0.0, 0.0, 0.0]  # and no parameter went unused


# -- sharded ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_sharded(config, root, run_script, tmp_path_factory):
    """The same training with FSDP, which EMAHook cannot do: whole, and resumed."""
    folder = tmp_path_factory.mktemp("sharded")
    path = config.with_name("sharded.py")
    base = str(root / "configs" / "_base_" / "fsdp.py")
    hook = "dict(type='MaskDecayHook', start='1/N', begin=0, finish=0.4, interval=1)"
    path.write_text(f"_base_ = [{str(config)!r}, {base!r}]\ncustom_hooks = [{hook}]\n")
    arguments = ("--cfg-options", "train_dataloader.batch_size=2")
    for name, extra in (("whole", ()), ("resumed", ("--resume",))):
        (folder / name).mkdir()
        if extra:
            shutil.copy(folder / "whole" / "epoch_1.pth", folder / name)
            last = folder / name / "last_checkpoint"
            last.write_text(str(folder / name / "epoch_1.pth"))
        done = run_script(
            *("dist_train.sh", path, 2, "--work-dir", folder / name),
            *(*extra, *arguments),
            cwd=folder,
            path=[config.parent],
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(config=path, work_dir=folder)


def test_sharded_training_equals_that_of_one_process(trained_sharded, trained_by_two):
    """Clipping by the norm of all shards and rules by shape and name included."""
    sharded = load_checkpoint(trained_sharded.work_dir / "whole" / "epoch_3.pth")
    one = trained_by_two.checkpoint_of_one
    raw = select_weights(one, ema=False)
    assert sharded["state_dict"].keys() == raw.keys()
    assert_close(dict(sharded["state_dict"]), raw, atol=1e-5, rtol=1e-4)
    norms = [
        checkpoint["message_hub"]["log_scalars"]["train/grad_norm"].data[0]
        for checkpoint in (sharded, one)
    ]
    assert_close(norms[0], norms[1], atol=1e-4, rtol=1e-4)
    assert sharded["meta"]["mask_decay"] == one["meta"]["mask_decay"]


def test_sharded_training_is_resumed_exactly(trained_sharded):
    whole, resumed = (
        load_checkpoint(trained_sharded.work_dir / name / "epoch_3.pth")
        for name in ("whole", "resumed")
    )
    assert_close(dict(resumed["state_dict"]), dict(whole["state_dict"]), atol=0, rtol=0)


def test_sharded_checkpoints_are_converted_and_evaluated(
    trained_sharded, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(trained_sharded.config.parent)
    checkpoint = trained_sharded.work_dir / "whole" / "epoch_3.pth"
    out = tmp_path / "deployed.pth"
    cfg = load_config(trained_sharded.config)
    assert convert(cfg, checkpoint, out).difference < 1e-4
    accuracy = {
        evaluate(load_config(config, work_dir=str(tmp_path)), source).metrics[
            "accuracy/top1"
        ]
        for config, source in (
            (trained_sharded.config, checkpoint),
            (out.with_suffix(".py"), out),
        )
    }
    assert len(accuracy) == 1


# -- evaluation and errors -------------------------------------------------------------


def test_evaluation_is_gathered_whole(trained, make_people, run_script, tmp_path):
    """Three images: one process gets two of them, the other one and a repeated one."""
    people = make_people(tmp_path / "people", images=3)
    options = {"data_root": str(people), "work_dir": str(tmp_path / "one")}
    expected = evaluate(load_config(trained.config, options), trained.masks_off)

    done = run_script(
        *("dist_test.sh", trained.config, trained.masks_off, 2),
        *("--work-dir", tmp_path / "two", "--out", tmp_path / "two.pkl"),
        *("--cfg-options", f"data_root={people}"),
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pruned the auxiliary softmax branch") == 1
    (log,) = (tmp_path / "two").glob("*/2*.json")
    metrics = json.loads(log.read_text())
    assert expected.metrics["coco/bbox_AR@100"] > 0
    assert {name: metrics[name] for name in expected.metrics} == expected.metrics
    predictions = pickle.loads((tmp_path / "two.pkl").read_bytes())
    images = json.loads((people / "annotations" / "val.json").read_text())["images"]
    assert [p["img_id"] for p in predictions] == [image["id"] for image in images]


def test_an_error_in_one_process_ends_all_of_them(config, run_script, tmp_path):
    done = run_script(
        *("dist_train.sh", config, 2, "--work-dir", tmp_path),
        *("--cfg-options", "custom_hooks.2.type=Failure"),
        cwd=tmp_path,
        path=[config.parent],
    )
    assert done.returncode != 0
    assert done.seconds < 90
    assert done.stderr.count("picture 7 cannot be read") == 2  # raised, and its line
    assert "[rank1]: ValueError: picture 7 cannot be read" in done.stderr
    # The other process only lost contact, and says nothing.
    assert "[rank0]" not in done.stderr and "Connection closed" not in done.stderr


def test_an_error_that_all_processes_meet_is_said_once(run_script, tmp_path):
    done = run_script("dist_train.sh", tmp_path / "none.py", 2, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: config ") == 1
    assert "none.py does not exist: check the path" in done.stderr
