"""Weights of MViTv2, from each library that has them."""

import re

import pytest
import timm
import torch
from forms import RELEASED
from mmpretrain.models.backbones import MViT
from timm.models.mvitv2 import checkpoint_filter_fn
from torch import nn

import mmcastling

SOFTMAX = dict(attention="softmax")


@pytest.fixture(scope="module")
def timm_model(randomise):
    return randomise(timm.create_model("mvitv2_tiny", num_classes=5))


@pytest.fixture(scope="module")
def mmpretrain_model(randomise):
    return randomise(MViT("tiny"))


def timm_features(model, x):
    with torch.no_grad():
        tokens = model.forward_features(x)  # (B, N, C)
    return tokens.transpose(1, 2).unflatten(2, (-1, x.shape[3] // 32))


def original_names(weights):
    """timm's weights under the names of the original repository."""
    blocks = list(
        dict.fromkeys(re.findall(r"stages\.\d+\.blocks\.\d+", "\n".join(weights)))
    )
    result = {}
    for name, value in weights.items():
        if name.startswith("stages"):
            _, stage, _, block, rest = name.split(".", 4)
            number = blocks.index(f"stages.{stage}.blocks.{block}")
            rest = rest.replace("shortcut_proj_attn", "proj")
            name = f"blocks.{number}.{rest}"
        result[name.replace("head.fc", "head.projection")] = value
    return result


def assert_same_features(imported, x, expected):
    with torch.no_grad():
        (features,) = imported.backbone(x)
    assert expected.abs().max() > 0.1
    assert (features - expected).abs().max() < 1e-5 * expected.abs().max()
    assert imported.missing == imported.unexpected == []


def test_timm_gives_the_same_features(timm_model, run_import, images):
    imported = run_import(timm_model.state_dict(), "mvit", "tiny", **SOFTMAX)
    assert set(imported.report.dropped) == {"head.fc.weight", "head.fc.bias"}
    x = images(224, 224)
    assert_same_features(imported, x, timm_features(timm_model, x))


def test_original_names_mean_what_timms_filter_says(timm_model, run_import, images):
    weights = timm_model.state_dict()
    original = {"model_state": original_names(weights), "cfg": "text", "epoch": 1}
    theirs = checkpoint_filter_fn(original, timm_model)
    assert set(theirs) == set(weights)
    assert all(torch.equal(theirs[name], weights[name]) for name in weights)
    imported = run_import(original, "mvit", "tiny", **SOFTMAX)
    assert imported.report.where == "model_state."
    x = images(224, 224)
    assert_same_features(imported, x, timm_features(timm_model, x))


@pytest.mark.parametrize("size", [(224, 224), (192, 256)], ids=str)
def test_mmpretrain_gives_the_same_features(size, mmpretrain_model, run_import, images):
    weights = {f"backbone.{n}": v for n, v in mmpretrain_model.state_dict().items()}
    imported = run_import({"state_dict": weights}, "mvit", "tiny", **SOFTMAX)
    x = images(*size)
    with torch.no_grad():
        assert_same_features(imported, x, mmpretrain_model(x)[0])


def test_tables_of_relative_positions_are_resized(mmpretrain_model, run_import):
    weights = mmpretrain_model.state_dict()
    imported = run_import(weights, "mvit", "tiny", img_size=(192, 256), **SOFTMAX)
    for axis, length in (("h", 2 * 48 - 1), ("w", 2 * 64 - 1)):
        name = f"blocks.0.attn.rel_pos_{axis}"
        expected = nn.functional.interpolate(
            weights[name].t()[None], size=length, mode="linear"
        )[0].t()
        torch.testing.assert_close(imported.weights[name], expected)
        assert "resized" in imported.report.changed[name]


def test_castled_blocks_compute_what_castle_makes_of_the_model(
    randomise, run_import, images
):
    model = randomise(MViT("tiny"))
    attention = dict(RELEASED, type="linear_angular", local_conv=None)
    imported = run_import(model.state_dict(), "mvit", "tiny", dict(attention=attention))
    for block in imported.backbone.blocks:
        if hasattr(block.attn, "norm_out"):  # the one layer that castle() has not
            block.attn.norm_out = nn.Identity()
    mmcastling.castle(model, **attention)
    with torch.no_grad():
        (expected,) = model(images(160, 224))
        (features,) = imported.backbone(images(160, 224))
    assert (features - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_castled_network_brings_its_own_mixers(randomise, run_import):
    model = MViT("tiny")
    options = dict(RELEASED, local_conv="token")
    mmcastling.castle(model, type="linear_angular", **options)
    weights = randomise(model).state_dict()
    imported = run_import(weights, "mvit", "tiny")
    mixers = {name for name in weights if ".mixer." in name}
    assert len(mixers) == 10
    assert mixers <= set(imported.report.loaded)
    assert all(torch.equal(imported.weights[name], weights[name]) for name in mixers)


def test_what_is_new_and_what_has_no_place_is_named(timm_model, run_import):
    report = run_import(timm_model.state_dict(), "mvit", "tiny").report
    lost = {n for n, why in report.dropped.items() if "relative positions" in why}
    assert lost == {n for n in timm_model.state_dict() if "rel_pos" in n}
    kinds = {name.split(".", 3)[-1] for name in report.new}
    assert kinds == {
        "mixer.local_conv.weight",
        "pool_out.weight",
        "norm_out.weight",
        "norm_out.bias",
    }
    assert "starts as the published subsampling: blocks.*.attn.pool_out" in str(report)


def test_norms_of_other_scales_are_kept(randomise, run_import):
    model = randomise(MViT("tiny", out_scales=(1, 3)))
    imported = run_import(model.state_dict(), "mvit", "tiny")
    assert imported.report.backbone["out_indices"] == [1, 3]
    assert torch.equal(imported.weights["norm1.bias"], model.norm1.bias)
