"""Conversion: what is written is pruned, verified, plain, and whole or not there."""

import shutil

import pytest
import torch
from mmengine.registry import MODELS
from torch.testing import assert_close

from mmcastling.checkpoint import CheckpointError, load_checkpoint
from mmcastling.data import DatasetError
from mmcastling.deploy import features
from mmcastling.run import ConfigError, convert, load_config
from mmcastling.run import conversion as module
from mmcastling.verbs import castling_modules, restore_mask

pytestmark = pytest.mark.slow


@pytest.fixture
def cfg(trained):
    return load_config(trained.config)


@pytest.fixture
def classifier(trained_classifier):
    return load_config(trained_classifier.config)


def built(config, checkpoint):
    """A model from a config file with all of a checkpoint's weights."""
    model = MODELS.build(load_config(config).model)
    loaded = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(loaded["state_dict"])
    return model.eval()


def trained_model(run, checkpoint):
    model = MODELS.build(load_config(run.config).model)
    loaded = load_checkpoint(checkpoint)
    model.load_state_dict(loaded["state_dict"])
    restore_mask(model, loaded)
    return model.eval()


# -- what is written -------------------------------------------------------------------


def test_the_deployed_model_computes_what_the_trained_one_does(cfg, trained, tmp_path):
    report = convert(cfg, trained.masks_off, tmp_path / "out.pth")
    assert (report.attentions, report.images) == (2, 4)
    assert report.difference <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth", "out.py"]

    written = torch.load(tmp_path / "out.pth", weights_only=True)  # and no allow-list
    assert set(written) == {"meta", "state_dict"}
    assert written["meta"]["deploy"] is True
    assert written["meta"]["source"] == "iter_4.pth"
    assert written["meta"]["iter"] == 4
    assert tuple(written["meta"]["dataset_meta"]["classes"]) == ("person",)
    assert all(type(value) is torch.Tensor for value in written["state_dict"].values())

    config = load_config(tmp_path / "out.py")
    assert config.model.backbone.deploy is True
    assert config.custom_hooks == []
    deployed = built(tmp_path / "out.py", tmp_path / "out.pth")
    assert not list(castling_modules(deployed))
    images = torch.randn(1, 3, 128, 128)
    reference = trained_model(trained, trained.masks_off)
    assert_close(features(deployed, images), features(reference, images))


def test_the_classifier_is_converted_the_same_way(
    classifier, trained_classifier, tmp_path
):
    report = convert(classifier, trained_classifier.masks_off, tmp_path / "out.pth")
    assert report.attentions == report.images == 4
    deployed = built(tmp_path / "out.py", tmp_path / "out.pth")
    images = torch.randn(2, 3, 64, 64)
    reference = trained_model(trained_classifier, trained_classifier.masks_off)
    assert_close(features(deployed, images), features(reference, images))
    assert [hook.type for hook in load_config(tmp_path / "out.py").custom_hooks] == []


@pytest.mark.parametrize(("ema", "averaged"), [(None, 1), (True, 1), (False, 0)])
def test_averaged_or_raw_weights_are_taken(
    ema, averaged, classifier, trained_classifier, tmp_path
):
    source = load_checkpoint(trained_classifier.masks_off)
    key = "backbone.layers.0.attn.qkv.weight"
    raw = source["ema_state_dict"][f"module.{key}"]
    expected = {1: source["state_dict"][key], 0: raw}
    assert not torch.equal(expected[0], expected[1])
    out = tmp_path / "out.pth"
    convert(classifier, trained_classifier.masks_off, out, verify=False, ema=ema)
    written = load_checkpoint(out)["state_dict"]
    assert torch.equal(written[key], expected[averaged])
    assert not any("module" in name or name == "steps" for name in written)


# -- masks that are on -----------------------------------------------------------------


def test_masks_that_are_on_are_refused_with_the_measured_difference(
    cfg, trained, tmp_path
):
    with pytest.raises(CheckpointError) as caught:
        convert(cfg, trained.masks_on, tmp_path / "out.pth")
    text = str(caught.value)
    assert f"the masks of {trained.masks_on} have not decayed" in text
    assert "--force" in text
    measured = float(text.partition("by up to ")[2].partition(". ")[0])
    assert list(tmp_path.iterdir()) == []

    report = convert(cfg, trained.masks_on, tmp_path / "out.pth", force=True)
    assert report.difference == pytest.approx(measured, rel=1e-2)
    assert report.difference > 1e-3
    assert (tmp_path / "out.pth").is_file() and (tmp_path / "out.py").is_file()


def test_without_data_the_state_of_the_masks_decides(cfg, trained, tmp_path):
    cfg.test_dataloader.dataset.data_root = str(tmp_path / "none")
    with pytest.raises(CheckpointError, match="its state says that the branch is on"):
        convert(cfg, trained.masks_on, tmp_path / "on.pth")
    report = convert(cfg, trained.masks_off, tmp_path / "off.pth")
    assert (report.difference, report.images) == (None, 0)
    convert(cfg, trained.masks_on, tmp_path / "on.pth", force=True)
    assert (tmp_path / "on.pth").is_file()


def test_no_images_verify_nothing(cfg, trained, tmp_path):
    with pytest.raises(CheckpointError, match="its state says that the branch is on"):
        convert(cfg, trained.masks_on, tmp_path / "out.pth", num_images=0)


def test_verification_that_is_asked_for_needs_the_data(cfg, trained, tmp_path):
    cfg.test_dataloader.dataset.data_root = str(tmp_path / "none")
    with pytest.raises(DatasetError, match="none does not exist"):
        convert(cfg, trained.masks_off, tmp_path / "out.pth", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_refused(cfg, trained, tmp_path):
    source = torch.load(trained.masks_off, weights_only=False)
    source["state_dict"]["backbone.ln1.bias"][0] = float("nan")
    torch.save(source, tmp_path / "diverged.pth")
    with pytest.raises(CheckpointError, match=r"diverged\.pth are not finite"):
        convert(cfg, tmp_path / "diverged.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


# -- whole or not at all ---------------------------------------------------------------


@pytest.mark.parametrize("previous", [True, False])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_failure_while_saving_changes_nothing(
    error, previous, cfg, trained, tmp_path, monkeypatch
):
    out = tmp_path / "out.pth"
    if previous:
        convert(cfg, trained.masks_off, out, verify=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        convert(cfg, trained.masks_off, out, verify=False)
    if isinstance(error, OSError):
        assert f"cannot write {out}" in str(caught.value)
        assert "No space left" in str(caught.value)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == before and len(left) == (2 if previous else 0)


def test_a_previous_conversion_is_replaced_and_nothing_else(cfg, trained, tmp_path):
    out, config = tmp_path / "out.pth", tmp_path / "out.py"
    convert(cfg, trained.masks_off, out, verify=False)
    config.write_text(config.read_text() + "changed = 1")
    out.write_bytes(out.read_bytes() + b"changed")
    convert(cfg, trained.masks_off, out, verify=False)
    assert "changed" not in config.read_text()
    assert load_checkpoint(out)["meta"]["deploy"]
    for path, content in (
        (config, b"def helper(): ..."),
        (out, trained.masks_on.read_bytes()),
        (out, b"no checkpoint"),
    ):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{path.name} would be replaced, and"):
            convert(cfg, trained.masks_off, out, verify=False)
        assert path.read_bytes() == content
        path.write_bytes(kept)


def test_what_cannot_be_loaded_again_is_not_kept(cfg, trained, tmp_path, monkeypatch):
    meta = {"meta": {"deploy": cfg}, "state_dict": {}}
    monkeypatch.setattr(module, "deploy_checkpoint", lambda *_, **__: meta)
    with pytest.raises(CheckpointError, match="is refused"):
        convert(cfg, trained.masks_off, tmp_path / "out.pth", verify=False)
    assert list(tmp_path.iterdir()) == []


# -- arguments -------------------------------------------------------------------------


def test_the_input_is_not_overwritten(cfg, trained, tmp_path):
    source = tmp_path / "weights.pth"
    shutil.copy(trained.masks_off, source)
    (tmp_path / "link.pth").symlink_to(source)
    before = source.read_bytes()
    for out in (source, tmp_path / "link.pth", tmp_path / "x" / ".." / "weights.pth"):
        with pytest.raises(CheckpointError, match="is the input"):
            convert(cfg, source, out)
    assert source.read_bytes() == before


def test_the_training_config_is_not_overwritten(trained, tmp_path):
    config = tmp_path / "model.py"
    shutil.copy(trained.config, config)
    before = config.read_text()
    with pytest.raises(ConfigError, match="in place of the training config"):
        convert(load_config(config), trained.masks_off, tmp_path / "model.pth")
    assert config.read_text() == before


def test_a_model_is_deployed_once(cfg, trained, tmp_path):
    convert(cfg, trained.masks_off, tmp_path / "out.pth", verify=False)
    again = tmp_path / "again.pth"
    with pytest.raises(CheckpointError, match=r"out\.pth has been deployed already"):
        convert(cfg, tmp_path / "out.pth", again)
    with pytest.raises(ConfigError, match="no auxiliary branch to prune"):
        convert(load_config(tmp_path / "out.py"), trained.masks_off, again)
    assert not again.exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("out", ConfigError, r"end the name in \.pth"),
        ("out.onnx", ConfigError, r"end the name in \.pth"),
        ("no/out.pth", ConfigError, "the folder .*no does not exist"),
        ("folder.pth", ConfigError, "it is a folder"),
    ],
)
def test_an_output_that_cannot_be_is_named(
    name, error, message, cfg, trained, tmp_path
):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(error, match=message) as caught:
        convert(cfg, trained.masks_off, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pth"]


def test_a_checkpoint_of_another_model_is_named(cfg, trained_classifier, tmp_path):
    with pytest.raises(CheckpointError, match="of another architecture") as caught:
        convert(cfg, trained_classifier.masks_off, tmp_path / "out.pth")
    for part in ("epoch_2.pth", "missing ", "and "):
        assert part in str(caught.value)


def test_averaged_weights_that_were_not_kept_are_an_error(cfg, trained, tmp_path):
    with pytest.raises(CheckpointError, match="--ema was given"):
        convert(cfg, trained.masks_off, tmp_path / "out.pth", ema=True)


def test_a_checkpoint_with_code_is_refused(cfg, attack, tmp_path):
    with pytest.raises(CheckpointError, match="is refused"):
        convert(cfg, attack.path, tmp_path / "out.pth")
    assert not attack.trace.exists()
