"""Models of libraries by name, with checkpoints of theirs, castled ones too."""

import sys

import pytest
import torch

import mmcastling
from mmcastling.errors import CheckpointError, OptionError, UnavailableError
from mmcastling.named_models import build_named_model

timm = pytest.importorskip("timm")
SMALL = "timm:test_vit"
SIZES = ((1, 3, 160, 160), (2, 3, 96, 208), (1, 3, 50, 70))
CASTLE = dict(type="castling", local_conv="token", keep=[-1])


def state_of(model, **meta):
    return dict(state_dict=model.state_dict(), meta=meta)


@pytest.mark.parametrize("shape", SIZES)
def test_a_model_of_timm_runs_at_any_size(shape):
    model = build_named_model(SMALL, num_classes=7)
    assert not model.training
    assert model(torch.randn(shape)).shape == (shape[0], 7)


@pytest.mark.parametrize("wrap", [dict, lambda w: {"state_dict": w}, "model"])
def test_checkpoints_load_strictly(tmp_path, wrap):
    model = build_named_model(SMALL, num_classes=7)
    weights = model.state_dict()
    path = tmp_path / "weights.pth"
    torch.save({wrap: weights} if isinstance(wrap, str) else wrap(weights), path)
    loaded = build_named_model(SMALL, str(path), num_classes=7)
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(loaded(x), model(x))
    with pytest.raises(CheckpointError, match=r"weights\.pth is of another .*head"):
        build_named_model(SMALL, str(path))


def test_safetensors_load(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = build_named_model(SMALL)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = build_named_model(SMALL, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("deploy", [False, True])
def test_a_castled_checkpoint_says_how_it_was_castled(tmp_path, deploy):
    model = mmcastling.castle(build_named_model(SMALL), **CASTLE)
    mmcastling.set_mask(model, 1.0)
    if deploy:
        model = mmcastling.switch_to_deploy(model)
    path = tmp_path / "castled.pth"
    torch.save(state_of(model, castle=CASTLE, deploy=deploy), path)
    loaded = build_named_model(SMALL, str(path))
    assert any(True for _ in mmcastling.castling_modules(loaded)) is not deploy
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="another architecture"):
        build_named_model(SMALL, str(path), castle=dict(type="performer"))


def test_torchvision_and_hugging_face(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    small = dict(image_size=32, num_classes=3)
    model = build_named_model("torchvision:vit_b_32", **small)
    assert type(model) is torchvision.models.VisionTransformer
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        image_size=32,
        patch_size=16,
    )
    saved = transformers.ViTForImageClassification(config).eval()
    saved.save_pretrained(tmp_path)
    model = build_named_model(f"hf:{tmp_path}")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x).logits, saved(x).logits)
    wide = torch.randn(1, 3, 48, 64)
    assert model(wide).logits.shape == (1, 2)
    model = mmcastling.castle(model, **CASTLE)
    mmcastling.set_mask(model, 1.0)
    model.save_pretrained(tmp_path / "castled")
    options = dict(CASTLE, mask_threshold=1.0)
    loaded = build_named_model(f"hf:{tmp_path / 'castled'}", castle=options)
    torch.testing.assert_close(loaded(wide).logits, model(wide).logits)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_tiny_patch16_224", {}, "give timm:NAME"),
        ("timm:", {}, "give timm:NAME"),
        ("timm:vit_tiny_patch16_244", {}, "do you mean .*vit_tiny_patch16_224"),
        ("torchvision:vit_b_61", {}, "do you mean .*vit_b_16"),
        (SMALL, dict(colour="red"), "cannot be built with .*colour"),
        ("hf:nowhere", {}, "no folder with a config.json"),
    ],
)
def test_bad_names_say_what_to_give(name, options, words):
    if name.startswith("hf"):
        pytest.importorskip("transformers")
    with pytest.raises(OptionError, match=words):
        build_named_model(name, **options)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnavailableError, match="pip install timm"):
        build_named_model(SMALL)
