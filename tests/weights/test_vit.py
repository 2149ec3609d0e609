"""Weights of plain vision transformers, from each library that has them."""

import re
from pathlib import Path

import pytest
import timm.models.deit
import timm.models.vision_transformer
import torch
import torchvision
from forms import RELEASED
from mmpretrain.models.backbones import DistilledVisionTransformer, VisionTransformer
from mmpretrain.models.utils import resize_pos_embed

import mmcastling
from mmcastling.checkpoint import CheckpointError
from mmcastling.models import CastlingViT

ARCH = "nano"
SIZES = dict(embed_dim=128, depth=4, num_heads=4, num_classes=5)
MM_ARCH = dict(embed_dims=128, num_layers=4, num_heads=4, feedforward_channels=512)
SOFTMAX = dict(attention=dict(type="softmax"), out_type="raw")
SHAPES = [(224, 224), (192, 256)]


def timm_vit(**options):
    return timm.models.vision_transformer.VisionTransformer(**SIZES, **options)


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=224,
        patch_size=16,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=512,
        num_classes=5,
    )


def torchvision_features(model, x):
    tokens = model._process_input(x)
    cls = model.class_token.expand(len(x), -1, -1)
    return model.encoder(torch.cat((cls, tokens), dim=1))


def huggingface_names(weights):
    """timm's weights under the names that transformers writes to disk."""
    result = {
        "vit.embeddings.cls_token": weights["cls_token"],
        "vit.embeddings.position_embeddings": weights["pos_embed"],
        "classifier.weight": weights["head.weight"],
        "classifier.bias": weights["head.bias"],
    }
    for kind in ("weight", "bias"):
        projection = f"vit.embeddings.patch_embeddings.projection.{kind}"
        result[projection] = weights[f"patch_embed.proj.{kind}"]
        result[f"vit.layernorm.{kind}"] = weights[f"norm.{kind}"]
        for i in range(4):
            old, new = f"blocks.{i}", f"vit.encoder.layer.{i}"
            parts = weights[f"{old}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                result[f"{new}.attention.attention.{name}.{kind}"] = part
            for theirs, ours in {
                "attention.output.dense": "attn.proj",
                "layernorm_before": "norm1",
                "layernorm_after": "norm2",
                "intermediate.dense": "mlp.fc1",
                "output.dense": "mlp.fc2",
            }.items():
                result[f"{new}.{theirs}.{kind}"] = weights[f"{old}.{ours}.{kind}"]
    return result


def assert_same_features(imported, x, expected):
    with torch.no_grad():
        (features,) = imported.backbone(x)
        difference = (features - expected).abs().max()
    assert expected.abs().max() > 0.1
    assert difference < 1e-5
    assert imported.missing == imported.unexpected == []


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("nesting", ["", "model", "module", "state_dict"])
def test_timm_gives_the_same_features(size, nesting, randomise, run_import, images):
    model = randomise(timm_vit(img_size=size))
    weights = model.state_dict()
    if nesting == "module":  # as a distributed wrapper saves it, beside the optimizer
        weights = {f"module.{name}": value for name, value in weights.items()}
        weights = {"state_dict": weights, "optimizer": {"state": {0: weights}}}
    elif nesting:
        weights = {nesting: weights, "epoch": 3}
    imported = run_import(weights, "vit", ARCH, SOFTMAX, img_size=size)
    x = images(*size)
    with torch.no_grad():
        assert_same_features(imported, x, model.forward_features(x))


def test_torchvision_gives_the_same_features(randomise, run_import, images):
    model, x = randomise(torchvision_vit()), images(224, 224)
    imported = run_import(model.state_dict(), "vit", ARCH, SOFTMAX)
    with torch.no_grad():
        assert_same_features(imported, x, torchvision_features(model, x))
    # At another size torchvision wants its table resized, as mmpretrain does it.
    wide, x = torchvision_vit().eval(), images(192, 256)
    table = model.encoder.pos_embedding
    resized = resize_pos_embed(table, (14, 14), (12, 16), "bicubic", 1)
    model.encoder.pos_embedding = torch.nn.Parameter(resized)
    wide._process_input = lambda x: model.conv_proj(x).flatten(2).transpose(1, 2)
    wide.encoder, wide.class_token = model.encoder, model.class_token
    with torch.no_grad():
        assert_same_features(imported, x, torchvision_features(wide, x))


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("resize_at", ["forward", "import"])
def test_mmpretrain_gives_the_same_features(
    size, resize_at, randomise, run_import, images
):
    model = randomise(VisionTransformer(arch=MM_ARCH, out_type="raw"))
    weights = {f"backbone.{n}": v for n, v in model.state_dict().items()}
    weights["head.layers.head.weight"] = torch.zeros(5, 128)
    options = dict(img_size=size) if resize_at == "import" else {}
    imported = run_import({"state_dict": weights}, "vit", ARCH, SOFTMAX, **options)
    assert imported.report.dropped == {
        "head.layers.head.weight": "outside the backbone"
    }
    x = images(*size)
    with torch.no_grad():
        assert_same_features(imported, x, model(x)[0])


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_split_projections_are_joined_in_order(
    size, randomise, run_import, images, tmp_path
):
    safetensors = pytest.importorskip("safetensors.torch")
    model = randomise(timm_vit(img_size=size))
    path = tmp_path / "model.safetensors"
    weights = huggingface_names(model.state_dict())
    safetensors.save_file({n: v.contiguous() for n, v in weights.items()}, path)
    imported = run_import(path, "vit", ARCH, SOFTMAX, img_size=size)
    assert len(imported.report.changed) == 2 * 4
    assert set(imported.report.dropped) == {"classifier.weight", "classifier.bias"}
    x = images(*size)
    with torch.no_grad():
        assert_same_features(imported, x, model.forward_features(x))


@pytest.mark.parametrize("names", ["model", "memory"])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_transformers_gives_the_same_features(kind, names, run_import):
    """On what ``record_transformers.py`` recorded of that library itself."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = Path(__file__).parent / "transformers" / kind
    arch = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=16)
    options = dict(dist_token=kind == "deit")
    source = folder / f"{names}.safetensors"
    imported = run_import(source, "vit", arch, SOFTMAX, **options)
    recorded = safetensors.load_file(folder / "features.safetensors")
    assert len(recorded) == 2
    for size, expected in recorded.items():
        height, width = map(int, size.split("x"))
        assert_same_features(imported, picture(height, width), expected)
    if kind == "deit":  # and without the second token, which then is dropped
        imported = run_import(source, "vit", arch, SOFTMAX)
        assert "embeddings.distillation_token" in imported.report.dropped
        table = safetensors.load_file(source)["embeddings.position_embeddings"]
        kept = torch.cat((table[:, :1], table[:, 2:]), dim=1)
        assert torch.equal(imported.weights["pos_embed"], kept)


def picture(height, width):
    """The image of ``record_transformers.py``."""
    count = torch.arange(3 * height * width, dtype=torch.float64)
    values = torch.sin(count * 0.37) + torch.sin(count.sqrt())
    return values.float().view(1, 3, height, width)


def test_the_castled_network_is_what_castle_makes_of_the_source(
    randomise, run_import, images
):
    model = randomise(timm_vit())
    attention = dict(type="linear_angular", **RELEASED, local_conv=None)
    build = dict(attention=attention, out_type="raw")
    imported = run_import(model.state_dict(), "vit", ARCH, build)
    mmcastling.castle(model, **attention)
    x = images(224, 224)
    with torch.no_grad():
        assert_same_features(imported, x, model.forward_features(x))


@pytest.mark.parametrize("library", ["timm", "mmpretrain", "torchvision"])
def test_a_castled_network_brings_its_own_mixers(
    library, randomise, run_import, images
):
    if library == "mmpretrain":
        model = VisionTransformer(arch=MM_ARCH, out_type="raw")
    else:
        model = timm_vit() if library == "timm" else torchvision_vit()
    attention = dict(type="linear_angular", **RELEASED, local_conv="token")
    mmcastling.castle(model, **attention)
    randomise(model)
    build = dict(attention=attention, out_type="raw")
    imported = run_import(model.state_dict(), "vit", ARCH, build)
    assert imported.report.new == {}
    x = images(224, 224)
    with torch.no_grad():
        if library == "mmpretrain":
            (expected,) = model(x)
        elif library == "timm":
            expected = model.forward_features(x)
        else:
            expected = torchvision_features(model, x)
        assert_same_features(imported, x, expected)


@pytest.mark.parametrize("mixer", ["", "mixer."])
def test_our_mixers_are_known_by_their_first_and_their_present_names(
    mixer, randomise, run_import
):
    model = randomise(CastlingViT(ARCH))
    own = model.state_dict()
    weights = {
        re.sub(r"\.attn\.(?:mixer\.)?local_conv", rf".attn.{mixer}local_conv", name): v
        for name, v in own.items()
    }
    imported = run_import(weights, "vit", ARCH)
    assert imported.report.new == {}
    assert set(imported.weights) == set(own)
    for name, value in own.items():
        assert torch.equal(imported.weights[name], value), name


def test_a_distillation_token_is_dropped_with_its_position(
    randomise, run_import, images
):
    distilled = randomise(timm.models.deit.VisionTransformerDistilled(**SIZES))
    imported = run_import({"model": distilled.state_dict()}, "vit", ARCH, SOFTMAX)
    assert "distillation token" in imported.report.dropped["dist_token"]
    assert "position removed" in imported.report.changed["pos_embed"]
    assert imported.report.dropped["head_dist.weight"] == "classifier"
    # The same network as if it had never had that token.
    plain = timm_vit().eval()
    weights = distilled.state_dict()
    table = weights["pos_embed"]
    weights["pos_embed"] = torch.cat((table[:, :1], table[:, 2:]), dim=1)
    plain.load_state_dict({n: weights[n] for n in plain.state_dict()})
    x = images(224, 224)
    with torch.no_grad():
        assert_same_features(imported, x, plain.forward_features(x))


@pytest.mark.parametrize("library", ["timm", "mmpretrain"])
def test_a_distillation_token_can_be_kept(library, randomise, run_import, images):
    if library == "timm":
        model = randomise(timm.models.deit.VisionTransformerDistilled(**SIZES))
        weights = model.state_dict()
    else:
        model = DistilledVisionTransformer(arch=MM_ARCH, out_type="raw")
        weights = randomise(model).state_dict()
        weights = {f"backbone.{name}": value for name, value in weights.items()}
    imported = run_import({"model": weights}, "vit", ARCH, SOFTMAX, dist_token=True)
    assert imported.report.backbone["with_dist_token"] is True
    assert imported.report.changed == {}
    for size in SHAPES if library == "mmpretrain" else SHAPES[:1]:
        x = images(*size)
        with torch.no_grad():
            if library == "timm":
                expected = model.forward_features(x)
            else:
                (expected,) = model(x)
            assert expected.shape[1] == 2 + size[0] // 16 * (size[1] // 16)
            assert_same_features(imported, x, expected)


def test_a_distillation_token_that_is_not_there_cannot_be_kept(randomise, run_import):
    weights = randomise(timm_vit()).state_dict()
    with pytest.raises(CheckpointError, match=r"no distillation token.*--dist-token"):
        run_import(weights, "vit", ARCH, dist_token=True)


def test_mae_leaves_its_decoder_behind(randomise, run_import, images):
    model = randomise(timm_vit())
    weights = {n: v for n, v in model.state_dict().items() if "head" not in n}
    decoder = dict(mask_token=torch.ones(1, 1, 8), decoder_pos_embed=torch.ones(1, 8))
    decoder["decoder_blocks.0.attn.qkv.weight"] = torch.ones(24, 8)
    imported = run_import({"model": weights | decoder}, "vit", ARCH, SOFTMAX)
    assert set(imported.report.dropped) == set(decoder)
    x = images(224, 224)
    with torch.no_grad():
        assert_same_features(imported, x, model.forward_features(x))


def test_global_pooling_norm_becomes_that_of_the_average(randomise, run_import, images):
    model = randomise(timm_vit(global_pool="avg", fc_norm=True))
    build = dict(attention=dict(type="softmax"))
    imported = run_import(model.state_dict(), "vit", ARCH, build)
    assert imported.report.backbone["out_type"] == "avg_featmap"
    x = images(224, 224)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert_same_features(imported, x, pooled)


def test_options_follow_from_the_weights(randomise, run_import, images):
    model = randomise(
        timm_vit(img_size=96, patch_size=8, init_values=0.1, qkv_bias=False, in_chans=1)
    )
    imported = run_import(model.state_dict(), "vit", ARCH, SOFTMAX, in_channels=1)
    options = imported.report.backbone
    assert (options["img_size"], options["patch_size"]) == (96, 8)
    assert options["qkv_bias"] is False
    x = images(96, 96, channels=1)
    with torch.no_grad():
        assert_same_features(imported, x, model.forward_features(x))


def test_a_class_token_without_a_position_gets_zero(randomise, run_import, images):
    model = randomise(timm_vit(no_embed_class=True))
    imported = run_import(model.state_dict(), "vit", ARCH, SOFTMAX)
    x = images(224, 224)
    with torch.no_grad():
        assert_same_features(imported, x, model.forward_features(x))


def test_without_a_class_token(randomise, run_import, images):
    model = randomise(timm_vit(class_token=False, global_pool="avg", fc_norm=False))
    imported = run_import(model.state_dict(), "vit", ARCH, SOFTMAX)
    assert imported.report.backbone["with_cls_token"] is False
    x = images(224, 224)
    with torch.no_grad():
        assert_same_features(imported, x, model.forward_features(x))


def test_half_precision_is_made_single(randomise, run_import):
    model = randomise(timm_vit()).half()
    imported = run_import(model.state_dict(), "vit", ARCH)
    assert {value.dtype for value in imported.weights.values()} == {torch.float32}
    expected = model.blocks[2].attn.qkv.weight.float()
    torch.testing.assert_close(
        imported.weights["layers.2.attn.qkv.weight"], expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("with_cls_token", [True, False])
def test_the_position_embedding_is_resized_when_the_file_is_loaded(
    with_cls_token, randomise, run_import
):
    model = randomise(timm_vit())
    imported = run_import(
        model.state_dict(),
        "vit",
        ARCH,
        dict(img_size=(96, 160), out_type="featmap", with_cls_token=with_cls_token),
    )
    table = resize_pos_embed(model.pos_embed, (14, 14), (6, 10), "bicubic", 1)
    expected = table if with_cls_token else table[:, 1:]
    torch.testing.assert_close(imported.backbone.pos_embed.data, expected.data)


def test_every_parameter_is_accounted_for(randomise, run_import):
    model = randomise(timm_vit())
    imported = run_import(model.state_dict(), "vit", ARCH)
    report = imported.report
    own = imported.backbone.state_dict()
    assert set(report.loaded) | set(report.new) == set(own)
    assert set(report.new) == {
        f"layers.{i}.attn.mixer.local_conv.weight" for i in range(4)
    }
    assert set(imported.missing) == set(report.new)
    elements = sum(value.numel() for value in own.values())
    new = 4 * 4 * 9  # layers, heads, kernel
    assert report.loaded_share == pytest.approx(1 - new / elements)
    text = str(report)
    assert "layers.*.attn.mixer.local_conv.weight (4)" in text
    assert "classifier: head.weight, head.bias" in text
    assert imported.checkpoint["meta"]["imported"]["source"] == "source.pth"


def test_several_networks_in_a_file(randomise, run_import):
    one, two = (randomise(timm_vit(), seed).state_dict() for seed in (1, 2))
    dino = {
        "student": {f"module.backbone.{n}": v for n, v in one.items()},
        "teacher": {f"backbone.{n}": v for n, v in two.items()},
    }
    imported = run_import(dino, "vit", ARCH)
    assert imported.report.where == "teacher.backbone."
    assert torch.equal(imported.weights["cls_token"], two["cls_token"])
    imported = run_import(dino, "vit", ARCH, prefix="student.module.backbone")
    assert torch.equal(imported.weights["cls_token"], one["cls_token"])
    moco = {f"base.{n}": v for n, v in one.items()}
    moco |= {f"momentum.{n}": v for n, v in two.items()}
    with pytest.raises(CheckpointError, match=r"base\.', .*momentum\.'.*--prefix"):
        run_import({"state_dict": moco}, "vit", ARCH)
    with pytest.raises(CheckpointError, match=r"'ema\.', 'student\.'.*--prefix"):
        run_import({"student": one, "ema": two}, "vit", ARCH)
    with pytest.raises(CheckpointError, match="no network has the prefix 'x'"):
        run_import({"state_dict": moco}, "vit", ARCH, prefix="x")


def test_our_own_weights_can_be_imported_for_another_size(randomise, run_import):
    model = randomise(CastlingViT(ARCH))
    weights = {f"backbone.{n}": v for n, v in model.state_dict().items()}
    imported = run_import({"state_dict": weights}, "vit", ARCH, img_size=448)
    assert imported.report.new == imported.report.dropped == {}
    table = resize_pos_embed(model.pos_embed, (14, 14), (28, 28), "bicubic", 1)
    torch.testing.assert_close(imported.weights.pop("pos_embed"), table.data)
    for name, value in imported.weights.items():
        assert torch.equal(value, model.state_dict()[name]), name
