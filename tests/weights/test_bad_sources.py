"""Sources and destinations that cannot be: a clear error, and nothing is written."""

import builtins
import re

import pytest
import timm
import torch

from mmcastling.checkpoint import CheckpointError
from mmcastling.errors import ConfigError
from mmcastling.weights import import_checkpoint


def vit(**options):
    sizes = dict(embed_dim=128, depth=4, num_heads=4, num_classes=5) | options
    return timm.models.vision_transformer.VisionTransformer(**sizes)


@pytest.fixture
def refused(tmp_path):
    """Import, expect an error with these parts in one line, and an unchanged folder."""

    def run(weights, *parts, family="vit", arch="nano", out="out.pth", **options):
        source = tmp_path / "source.pth"
        if isinstance(weights, dict):
            torch.save(weights, source)
        elif weights is not None:
            source = weights
        before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
        with pytest.raises((CheckpointError, ValueError)) as caught:
            import_checkpoint(source, tmp_path / out, family, arch, **options)
        message = str(caught.value)
        for part in parts:
            assert part in message, message
        assert "\n" not in message
        assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before

    return run


def test_another_family(refused):
    swin = timm.create_model("swin_s3_tiny_224", depths=(1, 1, 1, 1)).state_dict()
    parts = ["holds no ViT", "timm, DeiT", "patch_embed.proj.weight"]
    refused(swin, *parts)
    levit = timm.create_model("levit_128s").state_dict()
    refused(levit, "holds a LeViT, not a ViT", "import_levit.py")
    refused(levit, "not a MViTv2", "import_levit.py", family="mvit", arch="tiny")
    refused(vit().state_dict(), "import_vit.py", family="levit", arch="128")
    mvit = timm.create_model("mvitv2_tiny").state_dict()
    refused(mvit, "holds a MViTv2, not a ViT: use import_mvit.py")
    original = {
        re.sub(r"stages\.0\.blocks", "blocks", name): value
        for name, value in mvit.items()
    }
    refused(original, "holds a MViTv2, not a ViT: use import_mvit.py")
    refused({"a": torch.ones(1)}, "holds no ViT", "names begin with ['a']")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(embed_dim=192, num_heads=3), ["embed_dims 192, expected 128"]),
        (dict(depth=5), ["num_layers 5, expected 4"]),
        (dict(mlp_ratio=2), ["feedforward_channels 256, expected 512"]),
        (
            dict(embed_dim=192, num_heads=3, depth=12),
            ["another architecture than arch 'nano'", "They fit arch 'tiny'"],
        ),
        (dict(in_chans=1), ["images of 1 channels, expected 3", "--in-channels 1"]),
    ],
    ids=["width", "depth", "mlp", "another size", "channels"],
)
def test_another_architecture(options, parts, refused):
    refused(vit(**options).state_dict(), *parts)
    refused(vit(**options).state_dict(), *parts, allow_partial=True)


def test_another_size_of_the_pyramids(refused):
    levit = timm.create_model("levit_128").state_dict()
    parts = ["num_heads [4, 8, 12], expected [4, 6, 8]", "They fit arch '128'"]
    refused(levit, *parts, family="levit", arch="128s")
    weights = {n: v for n, v in levit.items() if "attn_downsample.q" not in n}
    refused(weights, "not complete: no stages.1.0.", family="levit", arch="128")
    weights = {n: v for n, v in levit.items() if "_downsample.kv.bn.b" not in n}
    refused(weights, "no stages.1.0.kv.bn.bias", family="levit", arch="128")
    mvit = timm.create_model("mvitv2_tiny").state_dict()
    parts = ["num_layers 10, expected 16", "They fit arch 'tiny'"]
    refused(mvit, *parts, family="mvit", arch="small")


def test_unknown_names_of_options(refused):
    weights = vit().state_dict()
    refused(weights, "arch 'huge' is not known", "nano", arch="huge")
    refused(weights, "attention type 'hard' is not known", attention="hard")
    refused(weights, "img_size (1, 2, 3)", img_size=(1, 2, 3))
    refused(weights, "noise -1 must", noise=-1)
    refused(weights, "family 'resnet' is not known", family="resnet")
    refused(weights, "no LeViT has one", family="levit", dist_token=True)
    refused(weights, "smaller than a token of 16x16 pixels", img_size=(8, 224))


def test_unknown_and_missing_parameters(refused, tmp_path):
    weights = vit().state_dict()
    weights["blocks.0.adapter.weight"] = torch.ones(2)
    weights.pop("norm.bias")
    parts = ["unknown blocks.0.adapter.weight", "missing ln1.bias", "--allow-partial"]
    refused(weights, *parts)
    out = tmp_path / "partial.pth"
    torch.save(weights, tmp_path / "weights.pth")
    report = import_checkpoint(
        tmp_path / "weights.pth", out, "vit", "nano", allow_partial=True
    )
    assert report.unexpected == ["unknown blocks.0.adapter.weight", "missing ln1.bias"]
    assert "ln1.bias" in report.new
    assert "let pass by --allow-partial" in str(report)
    written = torch.load(out, weights_only=True)["state_dict"]
    assert "backbone.ln1.bias" not in written
    assert "backbone.ln1.weight" in written


def test_a_parameter_under_two_names(refused):
    weights = vit(init_values=0.1).state_dict()
    weights["blocks.2.gamma_1"] = weights["blocks.2.ls1.gamma"]
    refused(weights, "unknown blocks.2.ls1.gamma")


def test_less_than_half_is_refused_even_if_partial(refused):
    weights = {n: v for n, v in vit().state_dict().items() if "mlp" not in n}
    parts = ["feedforward_channels None, expected 512"]
    refused(weights, *parts, allow_partial=True)
    weights["blocks.0.mlp.fc1.weight"] = vit().blocks[0].mlp.fc1.weight
    refused(weights, "only 49", "at least 50% are expected", allow_partial=True)


def test_positions_that_form_no_square(refused):
    weights = vit(img_size=(160, 224)).state_dict()
    refused(weights, "141 positions, of which 1", "--img-size H W")
    refused(weights, "is no square and cannot be resized", img_size=224)


@pytest.mark.parametrize(
    ("name", "change", "part"),
    [
        ("patch_embed.proj.weight", lambda w: w[:, :, None], "are of no ViT of images"),
        ("pos_embed", lambda w: w[0], "is (197, 128), expected (1, tokens, channels)"),
        ("pos_embed", lambda w: w[..., :64], "pos_embed"),
        ("blocks.1.attn.qkv.weight", lambda w: w[:9], "qkv.weight is (9, 128)"),
        ("blocks.1.mlp.fc1.weight", lambda w: w.to(torch.int8), "is of torch.int8"),
    ],
    ids=["video", "flat table", "narrow table", "shape", "quantised"],
)
def test_one_weight_of_another_kind(name, change, part, refused):
    weights = vit().state_dict()
    weights[name] = change(weights[name])
    refused(weights, part)
    refused(weights, part, allow_partial=True)


def test_one_of_three_projections_alone(refused):
    weights = vit().state_dict()
    whole = weights.pop("blocks.1.attn.qkv.weight")
    weights["blocks.1.attn.q.weight"], weights["blocks.1.attn.k.weight"] = whole.chunk(
        3
    )[:2]
    refused(weights, "stands alone", "layers.1.attn.v.weight is not in the file")


def test_damaged_files(refused, attack, tmp_path):
    refused(attack.path, "attack.pth is refused: it asks to run code")
    assert not attack.trace.exists()
    torch.save(vit().state_dict(), tmp_path / "whole.pth")
    cut = tmp_path / "cut.pth"
    cut.write_bytes((tmp_path / "whole.pth").read_bytes()[:90_000])
    refused(cut, "cut.pth (90000 bytes) is truncated")
    refused(tmp_path / "none.pth", "none.pth does not exist")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "folder", "is a folder", "such as model.safetensors")
    refused({"epoch": 3}, "holds no tensors")


def test_a_whole_pickled_model_is_refused(refused, tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    refused(tmp_path / "model.pth", "is refused", "save {'state_dict'")


def test_arguments_saved_by_training_scripts_do_no_harm(attack, tmp_path):
    import argparse

    weights, out = vit().state_dict(), tmp_path / "out.pth"
    source = tmp_path / "source.pth"
    torch.save({"model": weights, "args": argparse.Namespace(lr=0.1)}, source)
    import_checkpoint(source, out, "vit", "nano")
    assert out.exists()
    hidden = argparse.Namespace(callback=attack.payload)
    torch.save({"model": weights, "args": hidden}, source)
    with pytest.raises(CheckpointError, match="refused"):
        import_checkpoint(source, out, "vit", "nano")
    assert not attack.trace.exists()


def test_safetensors(refused, tmp_path, monkeypatch):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    save_file(vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:90_000])
    refused(path, "model.safetensors (90000 bytes) is truncated")
    refused(tmp_path / "none.safetensors", "none.safetensors does not exist")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(path, "needs the package safetensors: pip install safetensors")


def test_bad_destinations(refused, tmp_path):
    weights = vit().state_dict()
    refused(weights, "the folder", "missing does not exist", out="missing/out.pth")
    refused(weights, "is the source", out="source.pth")
    refused(weights, "out.safetensors: end the name in .pth", out="out.safetensors")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ConfigError, match=r"it is a folder, name a file"):
        import_checkpoint("x.pth", tmp_path / "folder.pth", "vit", "nano")
