"""Checkpoints: nothing in them is executed, and what is written is written whole."""

import json
import os
import pickle
import stat
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader, _safe_torch_load
from torch import nn

from mmcastling.checkpoint import (
    SAFE_GLOBALS,
    CheckpointError,
    check_weights_fit,
    load_checkpoint,
    load_weights,
    save_atomically,
    weights_of,
    write_json_atomically,
)
from mmcastling.compat.safe_loading import safe_mmengine_loading

# -- nothing is executed ---------------------------------------------------------------


def bare_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, old_format, bare_pickle])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(save, attack):
    save({"state_dict": {}, "meta": attack.payload}, attack.path)
    with pytest.raises(
        CheckpointError, match=r"attack\.pth is refused: it asks to run"
    ):
        load_checkpoint(attack.path)
    assert not attack.trace.exists()


def test_the_refused_object_is_named(attack):
    with pytest.raises(CheckpointError, match=r"the object (_?io)\.open"):
        load_checkpoint(attack.path)


class Reach:
    """Pickled as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.call = (getattr, (owner, name))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (HistoryBuffer, "__init__"),
        (HistoryBuffer, "_set_default_statistics"),
        (np.ndarray, "tofile"),
        (torch.Tensor, "mean"),
    ],
)
def test_getattr_reaches_nothing_but_the_statistics_of_a_history(owner, name, tmp_path):
    torch.save({"state_dict": {}, "x": Reach(owner, name)}, tmp_path / "reach.pth")
    with pytest.raises(CheckpointError, match=r"reach\.pth is refused"):
        load_checkpoint(tmp_path / "reach.pth")


def test_training_history_with_numpy_scalars_loads(tmp_path):
    history = HistoryBuffer()
    for value in (np.float64(1.0), 3.0, 5):
        history.update(value)
    content = {
        "message_hub": {
            "log_scalars": {"train/loss": history},
            "runtime_info": {"iter": np.int64(3), "names": ("a", "b")},
            "resumed_keys": {"train/loss": True},
        },
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
    }
    torch.save(content, tmp_path / "history.pth")
    hub = load_checkpoint(tmp_path / "history.pth")["message_hub"]
    assert hub["runtime_info"] == {"iter": 3, "names": ("a", "b")}
    assert hub["log_scalars"]["train/loss"].statistics("mean") == 3.0


def test_a_history_without_mmengine_says_what_reads_it(tmp_path, monkeypatch):
    save_atomically({"history": HistoryBuffer([1.0], [1])}, tmp_path / "history.pth")
    torch_alone = [
        kind
        for kind in SAFE_GLOBALS
        if kind is not HistoryBuffer and not isinstance(kind, tuple)
    ]
    monkeypatch.setattr("mmcastling.checkpoint.SAFE_GLOBALS", torch_alone)
    with pytest.raises(CheckpointError, match="import mmengine first"):
        load_checkpoint(tmp_path / "history.pth")


@pytest.mark.slow
def test_a_real_training_checkpoint_loads(trained):
    checkpoint = load_checkpoint(trained.masks_on)
    assert checkpoint["meta"]["iter"] == 2
    loss = checkpoint["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(loss, HistoryBuffer) and len(loss.data[0]) == 2
    assert np.isfinite(loss.mean())
    assert {int(s["step"]) for s in checkpoint["optimizer"]["state"].values()} == {2}
    assert checkpoint["param_schedulers"][0]["last_step"] == 2


def test_a_real_training_checkpoint_with_averaged_weights_loads(trained_classifier):
    checkpoint = load_checkpoint(trained_classifier.masks_off)
    raw, averaged = checkpoint["ema_state_dict"], checkpoint["state_dict"]
    key = "backbone.patch_embed.projection.weight"
    assert not torch.equal(raw[f"module.{key}"], averaged[key])


# -- inside MMEngine -------------------------------------------------------------------


def test_mmengine_does_not_fall_back_to_unpickling(attack):
    with safe_mmengine_loading():
        with pytest.raises(CheckpointError, match="is refused"):
            CheckpointLoader.load_checkpoint(str(attack.path))
        # What other schemes, such as https, end in.
        with pytest.raises(pickle.UnpicklingError):
            _safe_torch_load(str(attack.path))
    assert not attack.trace.exists()


def test_mmengine_loads_as_before_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    schemes = dict(CheckpointLoader._schemes)
    with pytest.raises(KeyError), safe_mmengine_loading():
        assert CheckpointLoader._schemes != schemes
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        raise KeyError
    assert CheckpointLoader._schemes == schemes
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"


def test_a_variable_that_asks_torch_to_unpickle_is_overruled(attack, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    good = attack.path.with_name("good.pth")
    torch.save({"state_dict": {"weight": torch.ones(2)}}, good)
    with safe_mmengine_loading():
        loaded = CheckpointLoader.load_checkpoint(str(good))
        with pytest.raises(CheckpointError, match="is refused"):
            CheckpointLoader.load_checkpoint(str(attack.path))
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(2))
    assert not attack.trace.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


# -- damaged files ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.pth"
    torch.save({"state_dict": {"weight": torch.arange(99.0)}, "meta": {"a": 1}}, path)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named_with_its_size(share, whole, tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    size = path.stat().st_size
    with pytest.raises(CheckpointError, match=rf"cut\.pth \({size} bytes\) is trunc"):
        load_checkpoint(path)


@given(position=st.floats(0, 1), byte=st.integers(0, 255), old=st.booleans())
@example(position=0.0, byte=0, old=True)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_loads_or_is_an_error_in_words(
    position, byte, old, whole, tmp_path
):
    path = tmp_path / "flipped.pth"
    if old:
        old_format({"state_dict": {"weight": torch.arange(4.0)}}, path)
        whole = path.read_bytes()
    index = int(position * (len(whole) - 1))
    path.write_bytes(whole[:index] + bytes([byte]) + whole[index + 1 :])
    try:
        assert isinstance(load_checkpoint(path), dict)
    except CheckpointError as error:
        assert "flipped.pth" in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, expected a dict with 'state_dict'"),
        ([1, 2], "holds a list, expected a dict"),
    ],
)
def test_what_is_no_checkpoint_is_described(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "other.pth")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name} does not exist: check"):
            load_checkpoint(path)


# -- files that claim more than they hold ----------------------------------------------


def expanded():
    return torch.zeros(1).expand(10**9)


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def doubled(times):
    value = [0, 0]
    for _ in range(times):
        value = [value, value]
    return value


def itself():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (expanded, "claims tensors of more than"),
        (lambda: [torch.zeros(10**6)] * 500, "claims tensors of more than"),
        (lambda: torch.zeros(10**9, device="meta"), "claims tensors of more than"),
        (lambda: torch.sparse_coo_tensor(size=(10**9,)), "claims tensors of more than"),
        (lambda: nested(300), "nests its values more than 100 deep"),
        (itself, "nests its values more than 100 deep"),
        (lambda: doubled(40), "claims more than 1,000 values"),
    ],
)
def test_what_claims_little_and_expands_to_much_is_refused(
    make, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("mmcastling.checkpoint.MOST_VALUES", 1000)
    path = tmp_path / "large.pth"
    torch.save({"state_dict": {"weight": make()}}, path)
    with pytest.raises(CheckpointError, match=rf"large\.pth is refused.*{message}"):
        load_checkpoint(path)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    torch.save({"state_dict": {"weight": torch.zeros(10**6)}}, tmp_path / "a.pth")
    path = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was unpacked"))
    with pytest.raises(CheckpointError, match=r"packed\.pth is refused.*unpacks to"):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", ["script", "exported"])
def test_a_program_is_no_checkpoint(kind, tmp_path):
    model, path = nn.Linear(2, 2), tmp_path / "program.pt"
    if kind == "script":
        torch.jit.save(torch.jit.trace(model, torch.ones(1, 2)), str(path))
    else:
        program = torch.export.export(model, (torch.ones(1, 2),))
        torch.export.save(program, path.with_suffix(".pt2"))
        path = path.with_suffix(".pt2")
    with pytest.raises(CheckpointError, match="refused: it is a program"):
        load_checkpoint(path)


def test_tied_and_repeated_weights_are_loaded(tmp_path):
    weight = torch.zeros(1000)
    content = {f"{i}.weight": weight for i in range(8)} | {"few": nested(90)}
    torch.save(
        {"state_dict": content, "ema": weight[None].expand(8, -1)}, tmp_path / "a"
    )
    assert len(load_checkpoint(tmp_path / "a")["state_dict"]) == 9


# -- weights and models ----------------------------------------------------------------


def test_weights_are_found_with_or_without_a_wrapper():
    weight = torch.ones(2)
    for checkpoint in (
        {"state_dict": {"module.weight": weight}},
        {"state_dict": {"weight": weight}},
        {"weight": weight},
        {"_orig_mod.weight": weight},
        {"module._orig_mod.weight": weight},
        {"_orig_mod.module.weight": weight},
    ):
        assert weights_of(checkpoint) == {"weight": weight}
    inside = {
        "backbone._orig_mod.layers.0._checkpoint_wrapped_module.weight": weight,
        "neck._fsdp_wrapped_module.module.weight": weight,
        "my_orig_mod.weight": weight,
    }
    names = ["backbone.layers.0.weight", "neck.module.weight", "my_orig_mod.weight"]
    assert list(weights_of(inside)) == names
    with pytest.raises(CheckpointError, match="of a model and of its wrapper"):
        weights_of({"weight": weight, "_orig_mod.weight": weight})
    with pytest.raises(
        CheckpointError, match=r"no weights: .* found the keys \['meta'"
    ):
        weights_of({"meta": {}, "optimizer": {}})


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weights = {key: value + 1.0 for key, value in before.items()}
    weights["1.weight"] = torch.zeros(1, 4)
    weights["2.bias"] = weights.pop("1.bias")
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, {"state_dict": weights}, "some.pth")
    for part in (
        "checkpoint some.pth is of another architecture",
        "missing 1.bias",
        "unexpected 2.bias",
        "1.weight is (1, 4), the model has (1, 3)",
    ):
        assert part in str(caught.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_only_the_first_misfits_are_listed():
    weights = {f"{i}.weight": torch.zeros(1) for i in range(20)}
    with pytest.raises(CheckpointError, match="; and 17 more"):
        check_weights_fit(nn.Linear(1, 1), weights, "some.pth")


def test_weights_that_fit_are_loaded():
    model, source = nn.Linear(2, 2), nn.Linear(2, 2)
    load_weights(model, {"state_dict": source.state_dict()}, "some.pth")
    torch.testing.assert_close(model.state_dict(), source.state_dict())


# -- writing ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failure_while_saving_leaves_the_previous_file_alone(
    error, tmp_path, monkeypatch
):
    path = tmp_path / "weights.pth"
    save_atomically({"state_dict": {"weight": torch.ones(2)}}, path)

    def fail(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_atomically({"state_dict": {"weight": torch.zeros(2)}}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.pth"]
    kept = load_checkpoint(path)["state_dict"]["weight"]
    assert torch.equal(kept, torch.ones(2))


def test_a_failure_while_saving_leaves_no_file(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomically({"hook": lambda: None}, tmp_path / "weights.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"the folder .*nowhere does not exist"):
        save_atomically({}, tmp_path / "nowhere" / "weights.pth")


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save_atomically({}, tmp_path / "weights.pth")
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "weights.pth").stat().st_mode)
    assert mode == 0o640


def test_numbers_of_numpy_and_torch_are_written_as_plain_ones(tmp_path):
    value = dict(
        a=np.float32(0.5), b=np.int64(2), c=torch.tensor(1.5), d=np.bool_(True)
    )
    write_json_atomically(tmp_path / "a.json", value)
    found = json.loads((tmp_path / "a.json").read_text())
    assert found == dict(a=0.5, b=2, c=1.5, d=True)
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json_atomically(tmp_path / "a.json", dict(a=np.zeros(2)))
    assert json.loads((tmp_path / "a.json").read_text()) == found
