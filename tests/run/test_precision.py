"""--amp and --auto-scale-lr: what they change in a config, and in training."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from mmcastling.checkpoint import load_checkpoint
from mmcastling.run import ConfigError, load_config, train
from mmcastling.run.training import enable_amp, enable_auto_scale_lr

KIND = "mmcastling.DeviceAmpOptimWrapper"


@pytest.fixture
def cfg(classifier_config, tmp_path):
    return load_config(classifier_config, work_dir=str(tmp_path / "run"))


def first_record(work_dir):
    (path,) = work_dir.glob("*/vis_data/scalars.json")
    return json.loads(path.read_text().splitlines()[0])


# -- --amp -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("float16",), ("bfloat16",)])
def test_the_command_trains_in_half_precision(
    arguments, classifier_config, run_main, tmp_path
):
    # A seed: with some weights the first step overflows at GradScaler's first scale,
    # 65536, and is skipped with an infinite norm in the log, as it should be.
    options = ("--cfg-options", "train_cfg.max_epochs=1", "randomness.seed=0")
    done = run_main(
        *("train.py", classifier_config, "--work-dir", tmp_path, *options),
        *("--amp", *arguments),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = first_record(tmp_path)
    assert 0 < record["loss"] < 2 and 0 < record["grad_norm"] < 100
    checkpoint = load_checkpoint(tmp_path / "epoch_1.pth")
    assert all(
        value.dtype == torch.float32 and value.isfinite().all()
        for value in checkpoint["state_dict"].values()
    )
    scaled = bool(checkpoint["optimizer"]["loss_scaler"])
    assert scaled == (arguments == ("float16",) or torch.cuda.is_available())


def test_the_config_s_own_precision_is_kept(cfg):
    cfg.optim_wrapper.update(type="AmpOptimWrapper", dtype="bfloat16", loss_scale=8.0)
    enable_amp(cfg)
    wrapper = cfg.optim_wrapper
    assert (wrapper.type, wrapper.dtype, wrapper.loss_scale) == (KIND, "bfloat16", 8.0)
    enable_amp(cfg, "float16")
    assert cfg.optim_wrapper.dtype == "float16"


def test_sharded_training_gets_its_scaler(cfg):
    cfg.runner_type, cfg.strategy = "FlexibleRunner", dict(type="FSDPStrategy")
    enable_amp(cfg)
    assert cfg.optim_wrapper.use_fsdp


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (dict(optim_wrapper=None), None, "lacks optim_wrapper"),
        (dict(), "float8", r"--amp 'float8' .* choose one of \['float16', 'bfloat16'"),
        (dict(optim_wrapper=dict(type="ApexOptimWrapper")), None, "'ApexOptimWrapper'"),
    ],
)
def test_what_cannot_be_cast_is_an_error(change, dtype, message, cfg):
    cfg.update(change)
    with pytest.raises(ConfigError, match=message):
        enable_amp(cfg, dtype)


def test_an_unknown_precision_is_a_usage_error(run_main, classifier_config):
    done = run_main("train.py", classifier_config, "--amp", "int8")
    assert done.returncode == 2
    assert "'int8'" in done.stderr and "bfloat16" in done.stderr


# -- --auto-scale-lr -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("counts", [1, 2])
def test_the_learning_rate_follows_the_batch_of_a_step(cfg, counts, tmp_path):
    cfg.train_cfg.max_epochs = 1
    cfg.auto_scale_lr.base_batch_size = 16
    cfg.optim_wrapper.accumulative_counts = counts
    cfg.optim_wrapper.constructor = "mmcastling.LayerDecayOptimWrapperConstructor"
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.5
    enable_auto_scale_lr(cfg)
    train(cfg)
    record = first_record(tmp_path / "run")
    # Four images a batch; the lowest of six layers is logged, and the base beside it.
    scaled = 1e-3 * 4 * counts / 16
    assert record["lr"] == pytest.approx(scaled * 0.5**5)
    optimizer = load_checkpoint(tmp_path / "run" / "epoch_1.pth")["optimizer"]
    top = [group for group in optimizer["param_groups"] if group["lr_scale"] == 1]
    assert [group["initial_lr"] for group in top] == pytest.approx([scaled] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(auto_scale_lr=None), r"base_batch_size=\.\.\."),
        (dict(auto_scale_lr=dict(enable=True)), r"base_batch_size=\.\.\."),
        (dict(auto_scale_lr=dict(base_batch_size=0)), "base_batch_size 0 must be a"),
        (dict(auto_scale_lr=dict(base_batch_size="16")), "base_batch_size '16' must"),
        (dict(train_dataloader=dict(dataset={})), r"train_dataloader=dict\(batch_size"),
    ],
)
def test_a_batch_size_that_the_config_does_not_give_is_an_error(change, message, cfg):
    change = {"auto_scale_lr": dict(base_batch_size=16), **change}
    with pytest.raises(ConfigError, match=message):
        enable_auto_scale_lr(
            SimpleNamespace(get={**cfg, **change}.get, filename=cfg.filename)
        )


# -- large batches ---------------------------------------------------------------------


@pytest.mark.slow
def test_accumulated_batches_equal_one_large_batch(cfg, tmp_path):
    """Two batches of two make a step of four, clipped as one."""
    cfg.optim_wrapper.optimizer = dict(type="SGD", lr=0.1, weight_decay=0.05)
    cfg.optim_wrapper.clip_grad = dict(max_norm=0.1)
    cfg.custom_hooks = [dict(type="MaskDecayHook", mode="none", start="1/N")]
    cfg.randomness = dict(seed=5)
    weights = {}
    for name, batch, counts in (("one", 4, 1), ("two", 2, 2)):
        run = cfg.copy()
        run.work_dir = str(tmp_path / name)
        run.train_dataloader.batch_size = batch
        run.optim_wrapper.accumulative_counts = counts
        train(run)
        checkpoint = load_checkpoint(tmp_path / name / "epoch_2.pth")
        assert checkpoint["meta"]["iter"] == 4 * counts
        weights[name] = dict(checkpoint["state_dict"])
        norms = checkpoint["message_hub"]["log_scalars"]["train/grad_norm"].data[0]
        assert min(norms) > 0.1  # all of them were clipped
    assert_close(weights["two"], weights["one"], atol=1e-6, rtol=1e-4)
