"""Checkpoints of releases in which an attention was its own mixer."""

import logging

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmcastling.attention import Attention
from mmcastling.attention.old_names import with_current_names
from mmcastling.checkpoint import CheckpointError, check_weights_fit, load_weights
from mmcastling.models import CastlingViT
from mmcastling.weights.importing import import_checkpoint

ARCH = dict(embed_dims=12, num_layers=2, num_heads=3, feedforward_channels=16)
KINDS = ["castling", "performer", "focused"]


def vit(kind="castling", seed=0, **options):
    torch.manual_seed(seed)
    return CastlingViT(
        ARCH, img_size=32, patch_size=8, attention=dict(type=kind), **options
    )


def old(model):
    """A model's weights under the names of earlier releases."""
    weights = {k.replace("mixer.", ""): v for k, v in model.state_dict().items()}
    assert list(weights) != list(model.state_dict())
    return weights


def load_by_checkpoint(model, weights):
    load_weights(model, dict(state_dict=weights), "old.pth")


def load_by_mmengine(model, weights):
    load_state_dict(model, weights, strict=True)


def load_inside_another(model, weights):
    holder = nn.ModuleDict(dict(backbone=model))
    holder.load_state_dict({f"backbone.{k}": v for k, v in weights.items()})


LOADERS = [
    nn.Module.load_state_dict,
    load_by_checkpoint,
    load_by_mmengine,
    load_inside_another,
]


@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_old_names_load_with_one_line_in_the_log(kind, load, caplog):
    source, model = vit(kind), vit(kind, seed=1)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mmcastling"):
            load(model, old(source))
        record, *rest = caplog.records
        assert "is of an earlier release" in record.message
        # Castled weights of that time do not say either in which state masks were.
        said = ["do not say in which state" in other.message for other in rest]
        assert said == [True] * (kind == "castling")
        assert ".mixer." in record.message and "\n" not in record.message
    for (name, value), other in zip(
        model.state_dict().items(), source.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    caplog.clear()
    load(model, source.state_dict())
    assert not any("earlier release" in record.message for record in caplog.records)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_alone_loads_them_too(kind):
    source, model = Attention(12, 3, type=kind), Attention(12, 3, type=kind)
    model.load_state_dict(old(source))
    assert list(source.state_dict()) == list(model.state_dict())


def test_init_cfg_and_the_importer_take_them(tmp_path):
    source, path = vit(), tmp_path / "old.pth"
    torch.save(dict(state_dict=old(source)), path)
    model = vit(seed=1, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    model.init_weights()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    imported = tmp_path / "imported.pth"
    assert not import_checkpoint(path, imported, "vit", ARCH).new
    names = {f"backbone.{name}" for name in source.state_dict()}
    assert set(torch.load(imported)["state_dict"]) == names


def test_parameters_keep_their_order_so_that_optimizer_states_fit():
    names = [name for name, _ in vit().layers[0].attn.named_parameters()]
    assert names == [
        "mixer.local_conv.weight",
        *("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"),
    ]


def test_names_that_a_model_knows_stay():
    weights = {"scale": 1, "a.scale": 2, "b.scale": 3, "c.directions": 4}
    own = {"scale", "mixer.scale", "a.mixer.scale", "b.other.scale"}
    found = with_current_names(weights, own)
    assert found == {"scale": 1, "a.mixer.scale": 2, "b.scale": 3, "c.directions": 4}


def test_what_does_not_fit_for_another_reason_is_refused_as_before():
    weights = old(vit())
    weights["layers.0.attn.local_conv.weight"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"mixer\.local_conv\.weight is \(5,\)"):
        check_weights_fit(vit(), dict(state_dict=weights), "old.pth")
