"""Weights of LeViT, from each library that has them."""

import importlib.util
from pathlib import Path

import mmpretrain
import pytest
import timm
import torch
from forms import RELEASED
from mmpretrain.models.backbones import LeViT
from mmpretrain.models.backbones.levit import Attention
from torch import nn

import mmcastling
from mmcastling.checkpoint import CheckpointError
from mmcastling.models import CastlingLeViT
from mmcastling.models.levit_blocks import CastlingLeViTAttention
from mmcastling.weights.levit_heads import ROWS, Heads, refit_attention

SOFTMAX = dict(attention="softmax")
NO_CONV = dict(RELEASED, local_conv=None)


@pytest.fixture
def make_mmpretrain(randomise, images):
    """Make mmpretrain's backbone with random weights."""

    def make(arch, img_size=224):
        model = LeViT(arch=arch, img_size=img_size)
        return randomise(model, images=images(img_size, img_size))

    return make


def original_names(weights):
    """mmpretrain's weights under the names of the original repository."""
    result, blocks = {}, []
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            name = ".".join(["patch_embed", *parts[2:]]).replace(".conv.", ".c.")
        else:
            if parts[1:3] not in blocks:
                blocks.append(parts[1:3])
            number = str(blocks.index(parts[1:3]))
            name = ".".join(["blocks", number, *parts[3:]])
            name = name.replace(".block.", ".m.").replace(".linear.", ".c.")
            name = name.replace(".linear1.", ".0.").replace(".linear2.", ".2.")
        result[name] = value
    result["head.l.weight"] = result["head_dist.l.weight"] = torch.zeros(3, 384)
    return result


def assert_same_features(imported, model, x):
    # In double precision: so many batch norms of random weights amplify rounding.
    with torch.no_grad():
        expected = model.double()(x.double())[0]
        (features,) = imported.backbone.double()(x.double())
    assert expected.flatten(2).std(dim=2).mean() > 0.1  # tokens differ
    assert (features - expected).abs().max() < 1e-5
    assert imported.missing == imported.unexpected == []


@pytest.mark.parametrize("size", [(224, 224), (192, 256)], ids=str)
@pytest.mark.parametrize("arch", ["128s", "192"])
def test_timm_gives_the_same_features(arch, size, randomise, run_import, images):
    model = timm.create_model(f"levit_{arch}", img_size=size, num_classes=5)
    model = randomise(model, images=images(*size))
    imported = run_import(model.state_dict(), "levit", arch, img_size=size, **SOFTMAX)
    assert set(imported.report.dropped.values()) == {"classifier"}
    grid = [-(-length // 64) for length in size]

    class Features(nn.Module):
        def forward(self, x):
            tokens = model.double().forward_features(x)  # (B, N, C)
            return (tokens.transpose(1, 2).unflatten(2, grid),)

    assert_same_features(imported, Features(), images(*size))


def test_variants_with_convolutions_for_linear_layers(make_mmpretrain, run_import):
    weights = original_names(make_mmpretrain("128s").state_dict())
    convolutions = {
        name: value[:, :, None, None]
        if name.startswith("blocks") and name.endswith("c.weight")
        else value
        for name, value in weights.items()
    }
    plain = run_import({"model": weights}, "levit", "128s").weights
    same = run_import({"model": convolutions}, "levit", "128s").weights
    assert set(plain) == set(same)
    assert all(torch.equal(plain[name], same[name]) for name in plain)


@pytest.mark.parametrize("size", [224, 256])
def test_mmpretrain_gives_the_same_features(size, make_mmpretrain, run_import, images):
    model = make_mmpretrain("128s", size)
    weights = {f"backbone.{n}": v for n, v in model.state_dict().items()}
    imported = run_import({"state_dict": weights}, "levit", "128s", **SOFTMAX)
    assert imported.report.backbone["img_size"] == size  # seen in the tables
    assert_same_features(imported, model, images(size, size))


def test_original_names_mean_what_mmpretrains_converter_says(
    make_mmpretrain, run_import, images
):
    model = make_mmpretrain("128s")
    weights = original_names(model.state_dict())
    path = Path(mmpretrain.__file__).parent / ".mim/tools/model_converters"
    spec = importlib.util.spec_from_file_location(
        "convert", path / "levit2mmpretrain.py"
    )
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    theirs = convert.convert_levit(None, weights)
    for name, value in model.state_dict().items():
        assert torch.equal(theirs[f"backbone.{name}"], value)
    imported = run_import({"model": weights}, "levit", "128s", **SOFTMAX)
    assert_same_features(imported, model, images(224, 224))


def test_tables_of_biases_are_resized(make_mmpretrain, run_import):
    model = make_mmpretrain("128s")
    imported = run_import(
        model.state_dict(), "levit", "128s", img_size=(192, 256), **SOFTMAX
    )
    name = "stages.0.0.block.attention_biases"
    table = model.state_dict()[name].unflatten(1, (14, 14))
    expected = nn.functional.interpolate(
        table[None], size=(12, 16), mode="bilinear", align_corners=True
    )[0].flatten(1)
    torch.testing.assert_close(imported.weights[name], expected)
    assert "from (4, 196) to (4, 192)" in imported.report.changed[name]


@pytest.mark.parametrize("branch", [False, True], ids=["linear", "branch"])
@pytest.mark.parametrize("arch", ["128s", "128"])
def test_castled_heads_compute_what_the_published_ones_would(
    arch, branch, make_mmpretrain, run_import, images
):
    # castle() keeps the published projections and drops the biases; "128s" has blocks
    # whose castled heads are more than the published ones.
    model = make_mmpretrain(arch)
    kind, options = "linear_angular", dict(NO_CONV)
    if branch:
        kind, options = "castling", dict(NO_CONV, mask_threshold=0.0)
    imported = run_import(
        model.state_dict(),
        "levit",
        arch,
        dict(attention=dict(type=kind, **options)),
        noise=0.0,
    )
    assert imported.unexpected == []
    mmcastling.castle(model, type=kind, **options)
    for network in (model, imported.backbone):  # the branch exists in training only
        network.train(branch)
    with torch.no_grad():
        (expected,) = model(images(224, 224))
        (features,) = imported.backbone(images(224, 224))
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


def test_noise_lets_copies_part_and_leaves_the_first(make_mmpretrain, run_import):
    model = make_mmpretrain("128")
    exact = run_import(model.state_dict(), "levit", "128", noise=0.0).weights
    noisy = run_import(model.state_dict(), "levit", "128").weights
    again = run_import(model.state_dict(), "levit", "128").weights
    name = "stages.0.0.block.qkv.linear.weight"
    q, k, v = exact[name].unflatten(0, (3, 4, 32))
    assert torch.equal(q[:, :16], q[:, 16:])
    theirs = model.state_dict()[name].unflatten(0, (4, 64))
    assert torch.equal(q[:, :16], theirs[:, :16])
    assert torch.equal(k[:, 16:], theirs[:, 16:32])
    assert torch.equal(v, theirs[:, 32:])
    q_noisy, k_noisy, v_noisy = noisy[name].unflatten(0, (3, 4, 32))
    assert torch.equal(q_noisy[:, :16], q[:, :16])
    assert torch.equal(v_noisy, v)
    for part, plain in ((q_noisy, q), (k_noisy, k)):
        difference = (part - plain)[:, 16:]
        assert difference.std() / theirs[:, :32].std() == pytest.approx(0.01, rel=0.2)
    assert torch.equal(noisy[name], again[name])


def test_too_many_heads_leave_the_lightest_out(make_mmpretrain, run_import):
    model = make_mmpretrain("384")
    block = "stages.1.2.block"  # 9 heads of 64, of which 512 channels hold 8
    weights = model.state_dict()
    proj = weights[f"{block}.proj.1.linear.weight"].unflatten(1, (9, 64))
    proj[:, 5] *= 0.1
    imported = run_import(weights, "levit", "384", noise=0.0)
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    expected = proj[:, kept].flatten(1)
    assert torch.equal(imported.weights[f"{block}.proj.1.linear.weight"], expected)
    for part in ROWS:
        rows = weights[f"{block}.qkv.{part}"].unflatten(0, (9, 128))[kept, 64:]
        held = imported.weights[f"{block}.qkv.{part}"].unflatten(0, (3, 8, 64))[2]
        assert torch.equal(held, rows)
    note = imported.report.changed[f"{block}.qkv.linear.weight"]
    assert "1 of 9 heads left out" in note
    assert (
        "left out" not in imported.report.changed["stages.0.0.block.qkv.linear.weight"]
    )


def test_biases_that_have_no_place_are_named(randomise, run_import):
    model = randomise(timm.create_model("levit_128s", num_classes=5))
    report = run_import(model.state_dict(), "levit", "128s").report
    lost = {n for n, why in report.dropped.items() if "logit biases" in why}
    assert lost == {n for n in model.state_dict() if "attention_biases" in n}
    assert all(name.endswith("mixer.local_conv.weight") for name in report.new)
    assert len(report.new) == len(lost)


@pytest.mark.parametrize(
    ("heads", "width"), [(2, 10), (3, 8), (4, 12)], ids=["wider", "more", "both"]
)
def test_refitted_heads_keep_the_function(heads, width, randomise):
    """Castled heads of every shape, and the published ones that castle() keeps."""
    options = dict(NO_CONV, type="linear_angular", norm_output=True)
    published = Attention(dim=16, key_dim=4, num_heads=2, attn_ratio=2, resolution=4)
    published = randomise(published)
    weights = {f"x.{name}": v.clone() for name, v in published.state_dict().items()}
    refit_attention(weights, "x", Heads(2, 4, 8), Heads(heads, width, width), 0.0)
    castled = CastlingLeViTAttention(16, heads * width, 16, heads, attention=options)
    held = {name.removeprefix("x."): value for name, value in weights.items()}
    result = castled.load_state_dict(held, strict=False)
    assert not result.missing_keys
    castled.eval()
    twin = mmcastling.castle(nn.ModuleList([published]), **options)[0]
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(castled(x, (4, 4)), twin(x), atol=1e-6, rtol=1e-5)
    # What was added must be able to learn: no gradient of the widths is all zero.
    castled.train()
    castled(x, (4, 4)).square().sum().backward()
    rows = castled.qkv.bn.weight.grad.unflatten(0, (3, heads, width))
    assert (rows[2, :2, 8:] != 0).all()
    columns = castled.proj[1].linear.weight.grad.unflatten(1, (heads, width))
    assert (columns[:, 2:].abs().sum(dim=(0, 2)) > 0).all()


def test_castled_weights_pass_as_they_are(randomise, run_import):
    model = randomise(CastlingLeViT("128s"))
    imported = run_import(model.state_dict(), "levit", "128s")
    assert imported.report.changed == imported.report.new == {}
    for name, value in imported.weights.items():
        assert torch.equal(value, model.state_dict()[name]), name
    with pytest.raises(CheckpointError, match="have another shape or type"):
        run_import(model.state_dict(), "levit", "128s", **SOFTMAX)
