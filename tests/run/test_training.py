"""Training: what can be resumed, where it goes on, and what may not be started from."""

import json
import shutil

import pytest
import torch
from mmengine.runner import Runner
from torch.testing import assert_close

from mmcastling.checkpoint import CheckpointError, load_checkpoint
from mmcastling.run import ConfigError, load_config, train
from mmcastling.run.training import newest_usable
from mmcastling.run.work_dir import LOCK, claimed_work_dir
from mmcastling.verbs import castling_modules

pytestmark = pytest.mark.slow

NO_VALIDATION = {"val_dataloader": None, "val_cfg": None, "val_evaluator": None}


def log_of(work_dir):
    """The records of training iterations in a work directory."""
    (path,) = work_dir.glob("*/vis_data/scalars.json")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if "loss" in record]


@pytest.fixture
def interrupted(trained, tmp_path):
    """A work directory that ends after two of four iterations."""
    work_dir = tmp_path / "run"
    work_dir.mkdir()
    checkpoint = work_dir / trained.masks_on.name
    shutil.copy(trained.masks_on, checkpoint)
    (work_dir / "last_checkpoint").write_text(str(checkpoint))
    return work_dir


@pytest.mark.parametrize("how", ["auto", "path"])
def test_resumed_training_goes_on_where_it_stopped(how, trained, interrupted, tmp_path):
    work_dir = interrupted
    resume = "auto"
    if how == "path":
        work_dir, resume = tmp_path / "other", str(trained.masks_on)
    cfg = load_config(trained.config, NO_VALIDATION, work_dir=str(work_dir))
    model = train(cfg, resume=resume)

    whole, rest = log_of(trained.work_dir), log_of(work_dir)
    assert [record["step"] for record in whole] == [1, 2, 3, 4]
    assert [record["step"] for record in rest] == [3, 4]
    weights = [record["mask_weight"] for record in whole]
    assert_close(weights, [1.0, 1 - 1 / 2.7, 1 - 2 / 2.7, 0.0])
    for expected, record in zip(whole[2:], rest, strict=True):
        for key in ("lr", "mask_weight", "mask_threshold", "mask_threshold_uniform"):
            assert record[key] == pytest.approx(expected[key]), key
        assert record["mask_density"] == pytest.approx(
            expected["mask_density"], abs=0.2
        )

    modules = [module for _, module in castling_modules(model)]
    assert len(modules) == 2 and not any(module.mask_is_on for module in modules)
    last = load_checkpoint(work_dir / "iter_4.pth")
    reference = load_checkpoint(trained.masks_off)
    assert last["meta"]["iter"] == 4
    assert last["meta"]["mask_decay"] == reference["meta"]["mask_decay"]
    assert {int(s["step"]) for s in last["optimizer"]["state"].values()} == {4}
    losses = last["message_hub"]["log_scalars"]["train/loss"].data[0]
    before = load_checkpoint(trained.masks_on)["message_hub"]["log_scalars"]
    assert len(losses) == 4
    assert_close(losses[:2], before["train/loss"].data[0])


def test_a_training_checkpoint_records_its_masks(trained):
    states = [
        load_checkpoint(path)["meta"]["mask_decay"]
        for path in (trained.masks_on, trained.masks_off)
    ]
    assert [state["mode"] for state in states] == ["weight"] * 2
    assert states[0]["weight"] == pytest.approx(1 - 1 / 2.7)
    assert states[1]["weight"] == 0.0
    assert [state["progress"] for state in states] == [pytest.approx(1 / 3), 1.0]


def test_resuming_averaged_weights_keeps_both_kinds(trained_classifier, tmp_path):
    cfg = load_config(trained_classifier.config, work_dir=str(tmp_path))
    train(cfg, resume=str(trained_classifier.masks_on))
    last = load_checkpoint(tmp_path / "epoch_2.pth")
    assert (last["meta"]["epoch"], last["meta"]["iter"]) == (2, 4)
    # Two of the four averaging steps were made before.
    assert int(last["ema_state_dict"]["steps"]) == 4


def test_a_copied_work_dir_goes_on_from_its_own_checkpoint(interrupted, trained):
    copied = interrupted.with_name("copied")
    shutil.copytree(interrupted, copied)
    (own,) = copied.glob("*.pth")
    assert (copied / "last_checkpoint").read_text() != str(own)
    assert newest_usable(str(copied)).source == str(own)
    own.unlink()  # kept elsewhere, as out_dir says
    assert newest_usable(str(copied)).source == str(interrupted / own.name)


def test_auto_resume_of_nothing_starts_anew(trained, tmp_path):
    options = {"train_cfg.max_iters": 1, **NO_VALIDATION}
    cfg = load_config(trained.config, options, work_dir=str(tmp_path / "new"))
    train(cfg, resume="auto")
    assert [record["step"] for record in log_of(tmp_path / "new")] == [1]


def test_auto_resume_of_nothing_starts_from_the_checkpoint_to_start_from(
    trained, tmp_path
):
    options = {"train_cfg.max_iters": 1, **NO_VALIDATION}
    options["optim_wrapper.optimizer.lr"] = 0.0
    options["load_from"] = str(trained.masks_off)
    cfg = load_config(trained.config, options, work_dir=str(tmp_path / "new"))
    found = dict(train(cfg, resume="auto").named_parameters())
    expected = load_checkpoint(trained.masks_off)["state_dict"]
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


# -- what may not be started from ------------------------------------------------------


def bare(trained, attack):
    path = attack.path.with_name("bare.pth")
    weights = load_checkpoint(trained.masks_off)["state_dict"]
    torch.save({"state_dict": weights}, path)
    return path


def deployed(trained, attack):
    path = attack.path.with_name("deployed.pth")
    checkpoint = load_checkpoint(trained.masks_off)
    checkpoint["meta"]["deploy"] = True
    torch.save(checkpoint, path)
    return path


def dangerous(trained, attack):
    checkpoint = torch.load(trained.masks_off, weights_only=False)
    checkpoint["message_hub"]["runtime_info"]["x"] = attack.payload
    torch.save(checkpoint, attack.path)
    return attack.path


def truncated(trained, attack):
    attack.path.write_bytes(trained.masks_off.read_bytes()[:-1000])
    return attack.path


def missing(trained, attack):
    return attack.path.with_name("none.pth")


def unrelated(trained, attack):
    path = attack.path.with_name("unrelated.pth")
    torch.save({"state_dict": {"backbone.fc.weight": torch.zeros(2)}}, path)
    return path


@pytest.mark.parametrize(
    ("make", "key", "message"),
    [
        (bare, "resume", r"no training state \(optimizer, message_hub, meta missing\)"),
        (deployed, "resume", "has been deployed: .* nothing to resume"),
        (deployed, "load_from", "has been deployed: layers were folded"),
        (unrelated, "load_from", "has only 0 of its .* parameters"),
        (dangerous, "resume", "is refused: it asks to run code"),
        (dangerous, "load_from", "is refused: it asks to run code"),
        (truncated, "resume", "is truncated or not a torch checkpoint"),
        (truncated, "load_from", "is truncated or not a torch checkpoint"),
        (missing, "resume", "does not exist"),
        (missing, "load_from", "does not exist"),
    ],
)
def test_what_cannot_be_started_from_is_refused_before_anything_is_written(
    make, key, message, trained, attack, tmp_path
):
    path = make(trained, attack)
    options = {"load_from": str(path)} if key == "load_from" else None
    cfg = load_config(trained.config, options, work_dir=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=message) as caught:
        train(cfg, resume=str(path) if key == "resume" else None)
    assert path.name in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert not attack.trace.exists()


def test_pretrained_weights_named_in_the_model_are_not_unpickled(
    trained, attack, tmp_path
):
    init = {"type": "Pretrained", "checkpoint": str(attack.path)}
    options = {"model.backbone.init_cfg": init}
    cfg = load_config(trained.config, options, work_dir=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="is refused"):
        train(cfg)
    assert not attack.trace.exists()


def test_a_checkpoint_of_another_model_is_not_resumed(
    trained, trained_classifier, tmp_path
):
    cfg = load_config(trained.config, work_dir=str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        train(cfg, resume=str(trained_classifier.masks_on))
    for part in ("of another architecture", "missing backbone.", "and"):
        assert part in str(caught.value)


def test_load_from_starts_at_zero_with_those_weights(trained, tmp_path):
    options = {
        "load_from": str(trained.masks_off),
        "train_cfg.max_iters": 1,
        "optim_wrapper.optimizer.lr": 0.0,
        **NO_VALIDATION,
    }
    model = train(load_config(trained.config, options, work_dir=str(tmp_path)))
    expected = load_checkpoint(trained.masks_off)["state_dict"]
    assert_close(dict(model.state_dict()), dict(expected))
    assert [record["step"] for record in log_of(tmp_path)] == [1]


# -- what cannot be trained ------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"model.roi_head.bbox_head.num_classes": 80},
            r"model\.roi_head\.bbox_head\.num_classes is 80, but the data has 1 class",
        ),
        ({"model.init_cfg": None}, "no parameter of the model is trained"),
    ],
)
def test_what_cannot_be_trained_is_told_before_training(
    option, message, trained, tmp_path, monkeypatch
):
    cfg = load_config(trained.config, option, work_dir=str(tmp_path))
    if "parameter" in message:
        build = Runner.build_model
        monkeypatch.setattr(
            Runner,
            "build_model",
            lambda self, spec: build(self, spec).requires_grad_(False),
        )
    with pytest.raises(ConfigError, match=message):
        train(cfg)
    assert not list(tmp_path.rglob("*.pth")) and not (tmp_path / LOCK).exists()


def test_a_work_dir_in_use_is_refused_and_left_alone(trained, tmp_path):
    with claimed_work_dir(tmp_path):
        before = sorted(tmp_path.iterdir())
        cfg = load_config(trained.config, work_dir=str(tmp_path))
        with pytest.raises(ConfigError, match=r"in use by another training: process"):
            train(cfg)
        assert sorted(tmp_path.iterdir()) == before


# -- options ---------------------------------------------------------------------------


def test_a_config_without_training_says_so(classifier_config, tmp_path):
    options = {"train_dataloader": None}
    cfg = load_config(classifier_config, options, work_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="lacks train_dataloader"):
        train(cfg)
    assert not (tmp_path / "run").exists()
