"""Launchers: what each needs, and what is changed where there is no GPU."""

import pytest
import torch
from mmengine.config import Config
from torch.distributed import TCPStore

from mmcastling.compat import cpu_group
from mmcastling.errors import ConfigError
from mmcastling.run import run_cli
from mmcastling.run import runner as module
from mmcastling.run.runner import LAUNCHERS, is_sharded, setup_distributed


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """No launcher's variable, and no group but the one that a test expects."""
    for name in {name for names in LAUNCHERS.values() for name in names}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.fixture
def started(monkeypatch):
    """Launchers and options with which MMEngine was asked to start a group."""
    calls = []
    monkeypatch.setattr(cpu_group, "init_dist", lambda *a, **k: calls.append((a, k)))
    return calls


def place(monkeypatch, launcher="pytorch", **values):
    for name in LAUNCHERS[launcher]:
        monkeypatch.setenv(name, str(values.get(name, 1)))


def on(monkeypatch, device, gpus=0):
    monkeypatch.setattr(module, "get_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize("launcher", ["pytorch", "slurm", "mpi"])
@pytest.mark.parametrize("backend", [None, "nccl", "mpi"])
def test_without_a_gpu_the_group_talks_over_gloo(
    launcher, backend, started, monkeypatch
):
    place(monkeypatch, launcher)
    on(monkeypatch, "cpu")
    options = {} if backend is None else dict(backend=backend)
    cfg = Config(
        dict(launcher=launcher, env_cfg=dict(dist_cfg=dict(options, timeout=9)))
    )
    setup_distributed(cfg)
    expected = "mpi" if backend == "mpi" else "gloo"
    assert started == [((launcher,), dict(backend=expected, timeout=9))]
    assert cfg.model_wrapper_cfg == dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=False,
        device_ids=None,
    )


def test_no_gpu_is_chosen_while_the_group_starts_on_a_cpu(monkeypatch):
    place(monkeypatch)
    on(monkeypatch, "cpu")
    real = torch.cuda.set_device
    seen = []
    monkeypatch.setattr(
        cpu_group, "init_dist", lambda *a, **k: seen.append(torch.cuda.set_device)
    )
    setup_distributed(Config(dict(launcher="pytorch")))
    assert seen != [real] and torch.cuda.set_device is real


def test_with_a_gpu_for_each_mmengine_does_it(started, monkeypatch):
    place(monkeypatch, LOCAL_RANK=1)
    on(monkeypatch, "cuda", gpus=2)
    cfg = Config(dict(launcher="pytorch"))
    setup_distributed(cfg)
    assert started == [] and "model_wrapper_cfg" not in cfg


def test_a_wrapper_of_the_config_is_kept_but_for_its_gpu(started, monkeypatch):
    place(monkeypatch)
    on(monkeypatch, "cpu")
    wrapper = dict(type="MMDistributedDataParallel", static_graph=True)
    cfg = Config(dict(launcher="pytorch", model_wrapper_cfg=wrapper))
    setup_distributed(cfg)
    assert cfg.model_wrapper_cfg == dict(wrapper, device_ids=None)


def test_a_flexible_runner_is_told_as_well(started, monkeypatch):
    place(monkeypatch)
    on(monkeypatch, "cpu")
    cfg = Config(dict(launcher="pytorch", runner_type="FlexibleRunner"))
    setup_distributed(cfg)
    assert cfg.strategy.type == "DDPStrategy"
    assert cfg.strategy.model_wrapper.device_ids is None


# -- sharded ---------------------------------------------------------------------------


@pytest.fixture
def sharded(root):
    return Config.fromfile(root / "configs" / "_base_" / "fsdp.py")


def test_any_config_can_be_sharded(root, tmp_path):
    configs = root / "configs"
    names = [configs / "mask_rcnn_castling_s_coco.py", configs / "_base_" / "fsdp.py"]
    (tmp_path / "both.py").write_text(f"_base_ = {[str(name) for name in names]}\n")
    cfg = Config.fromfile(tmp_path / "both.py")
    assert is_sharded(cfg) and cfg.model.type == "MaskRCNN"


def test_sharded_training_gets_our_strategy_and_clipping(sharded, started, monkeypatch):
    place(monkeypatch)
    on(monkeypatch, "cpu")
    assert is_sharded(sharded)
    sharded.update(launcher="pytorch", optim_wrapper=dict(type="OptimWrapper"))
    setup_distributed(sharded)
    assert is_sharded(sharded)
    assert sharded.strategy.type == "mmcastling.ResumableFSDPStrategy"
    assert sharded.strategy.model_wrapper.device_id == "cpu"
    assert sharded.optim_wrapper.type == "mmcastling.ShardedOptimWrapper"
    sharded.optim_wrapper = dict(type="AmpOptimWrapper")
    setup_distributed(sharded)
    half = dict(type="mmcastling.DeviceAmpOptimWrapper", use_fsdp=True)
    assert sharded.optim_wrapper == half


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(launcher="none"), "shards a model over several processes"),
        (dict(custom_hooks=[dict(type="EMAHook")]), "EMAHook cannot average"),
        (
            dict(optim_wrapper=dict(type="mmcastling.AGCOptimWrapper")),
            "AGCOptimWrapper cannot clip the gradients",
        ),
    ],
)
def test_what_sharding_cannot_do_is_an_error(change, message, sharded, monkeypatch):
    place(monkeypatch)
    sharded.update({"launcher": "pytorch", **change})
    with pytest.raises(ConfigError, match=message):
        setup_distributed(sharded)


# -- bad input -------------------------------------------------------------------------


def test_an_unknown_launcher_is_named():
    with pytest.raises(ConfigError, match=r"'ssh' is not known: choose one of .*slurm"):
        setup_distributed(Config(dict(launcher="ssh")))


@pytest.mark.parametrize("launcher", ["pytorch", "slurm", "mpi"])
def test_a_launcher_that_did_not_start_the_process_is_an_error(launcher):
    with pytest.raises(ConfigError) as caught:
        setup_distributed(Config(dict(launcher=launcher)))
    for part in (*LAUNCHERS[launcher], "was not started by it", "leave --launcher out"):
        assert part in str(caught.value)


@pytest.mark.parametrize("launcher", [None, "none"])
def test_torchrun_without_its_launcher_is_an_error(launcher, monkeypatch):
    """Every process would train alone and write the same files."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started 2 .* add --launcher pytorch"):
        setup_distributed(Config(dict(launcher=launcher)))
    monkeypatch.setenv("WORLD_SIZE", "1")
    setup_distributed(Config(dict(launcher=launcher)))


@pytest.mark.parametrize(
    ("launcher", "variable"),
    [
        ("pytorch", "LOCAL_RANK"),
        ("slurm", "SLURM_LOCALID"),
        ("mpi", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ],
)
def test_more_processes_than_gpus_are_an_error(launcher, variable, monkeypatch):
    place(monkeypatch, launcher, **{variable: 2})
    on(monkeypatch, "cuda", gpus=2)
    with pytest.raises(ConfigError, match=r"process 3 .* no GPU: 2 .* at most 2 proc"):
        setup_distributed(Config(dict(launcher=launcher)))


# -- one message -----------------------------------------------------------------------


def ends(error):
    """Run a command that fails; returns the exit status, None for a traceback."""

    def main():
        raise error

    try:
        run_cli(main)
    except SystemExit as caught:
        return caught.code
    except Exception as caught:
        assert caught is error
    return None


@pytest.fixture
def agent(monkeypatch):
    """torchrun's store, as its processes see it."""
    store = TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_what_all_processes_meet_is_said_by_the_first(agent, capsys, monkeypatch):
    assert ends(ConfigError("wrong")) == 1
    assert capsys.readouterr().err == "error: wrong\n"
    for error in (ConfigError("wrong"), ConfigError("wrong")):
        assert ends(error) == 1
        assert capsys.readouterr().err == ""
    # Another error of a single process is another message, and so is a restart's.
    assert ends(ConfigError("another")) == 1
    assert capsys.readouterr().err == "error: another\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ends(ConfigError("wrong")) == 1
    assert capsys.readouterr().err == "error: wrong\n"


def test_a_defect_that_all_processes_meet_keeps_one_traceback(agent):
    assert ends(KeyError("defect")) is None
    assert ends(KeyError("defect")) == 1


def test_without_a_store_to_ask_every_process_speaks(agent, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    for _ in range(2):
        assert ends(ConfigError("wrong")) == 1
        assert capsys.readouterr().err == "error: wrong\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo] Connection closed by peer [::1]"),
        RuntimeError("Connection reset by peer"),
        torch.distributed.DistNetworkError("timeout"),
    ],
)
def test_a_process_that_lost_contact_leaves_the_word_to_the_other(
    error, monkeypatch, capsys
):
    assert ends(error) is None  # of a single process it is its own error
    monkeypatch.setattr("mmcastling.run.failures.rank_and_size", lambda: (0, 2))
    assert ends(error) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: [process 1 of 2] lost contact to another process")
    assert str(error) not in text and text.count("\n") == 1


def test_a_message_names_its_process(monkeypatch, capsys):
    monkeypatch.setattr("mmcastling.run.failures.rank_and_size", lambda: (0, 4))

    def main():
        raise ConfigError("wrong")

    with pytest.raises(SystemExit):
        run_cli(main)
    assert capsys.readouterr().err == "error: [process 1 of 4] wrong\n"
