"""What ships: which weights, what a deployed checkpoint and its config hold."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.testing import assert_close

from mmcastling.checkpoint import CheckpointError
from mmcastling.deploy import (
    deploy_checkpoint,
    features,
    is_deployed,
    largest_difference,
    select_weights,
)
from mmcastling.run import load_config
from mmcastling.run.conversion import deploy_config
from mmcastling.run.runner import drop_training_hooks
from mmcastling.train import MaskDecayHook
from mmcastling.verbs import set_mask, switch_to_deploy

# -- which weights ---------------------------------------------------------------------

AVERAGED, RAW = torch.tensor([1.0]), torch.tensor([2.0])
BUFFER = torch.tensor([3.0])
WITH_EMA = {
    # EMAHook saves the averages as state_dict and what it averaged beside it.
    "state_dict": {"weight": AVERAGED, "buffer": BUFFER},
    "ema_state_dict": {"steps": torch.tensor(4), "module.weight": RAW},
}


@pytest.mark.parametrize(("ema", "weight"), [(None, 1.0), (True, 1.0), (False, 2.0)])
def test_averaged_weights_are_taken_unless_the_raw_ones_are_asked_for(ema, weight):
    weights = select_weights(WITH_EMA, ema)
    assert weights == {"weight": torch.tensor([weight]), "buffer": BUFFER}


def test_averaged_weights_that_are_not_there_are_an_error():
    plain = {"state_dict": {"weight": RAW}}
    with pytest.raises(CheckpointError, match=r"--ema was given, but .* no averaged"):
        select_weights(plain, True)
    for ema in (None, False):
        assert select_weights(plain, ema) == {"weight": RAW}


# -- the checkpoint --------------------------------------------------------------------


def test_a_deployed_checkpoint_is_plain_and_needs_no_allow_list(tmp_path):
    meta = {
        "dataset_meta": {
            "classes": ("a", "b"),
            "palette": np.array([[1, 2, 3]]),
            "count": np.int64(2),
            "scale": torch.tensor([0.5]),
            "kind": nn.Linear,
        },
        "iter": 7,
        "cfg": "the config as text",
        "hook_msgs": {"best": 1.0},
    }
    model = nn.Linear(2, 2)
    result = deploy_checkpoint(model, meta, source="a.pth", max_abs_diff=None)
    torch.save(result, tmp_path / "deployed.pth")
    with torch.serialization.safe_globals([]):
        loaded = torch.load(tmp_path / "deployed.pth", weights_only=True)
    assert set(loaded) == {"meta", "state_dict"}
    assert_close(loaded["state_dict"], dict(model.state_dict()))
    dataset_meta = loaded["meta"].pop("dataset_meta")
    assert dataset_meta["kind"] == str(nn.Linear)
    assert {k: v for k, v in dataset_meta.items() if k != "kind"} == {
        "classes": ("a", "b"),
        "palette": [[1, 2, 3]],
        "count": 2,
        "scale": [0.5],
    }
    assert set(loaded["meta"]) == {
        "iter",
        "source",
        "max_abs_diff",
        "deploy",
        "mmcastling_version",
    }
    assert is_deployed(loaded)


def test_weights_of_a_deployed_checkpoint_do_not_follow_the_model():
    model = nn.Linear(2, 2)
    saved = deploy_checkpoint(model, {})["state_dict"]["weight"]
    before = saved.clone()
    nn.init.zeros_(model.weight)
    assert torch.equal(saved, before)


@pytest.mark.parametrize(
    "checkpoint", [{}, {"meta": None}, {"meta": {}}, {"meta": {"deploy": False}}]
)
def test_other_checkpoints_are_not_deployed_ones(checkpoint):
    assert not is_deployed(checkpoint)


# -- the config ------------------------------------------------------------------------


def test_deployed_config_is_pruned_wherever_a_module_can_be():
    init_default_scope("mmpretrain")
    backbone = dict(type="mmcastling.CastlingViT", arch="nano", init_cfg=dict(a=1))
    model = dict(
        type="Ensemble",
        parts=[dict(backbone=backbone), dict(type="mmpretrain.RepVGG", arch="A0")],
        head=dict(type="LinearClsHead", loss=dict(type="CrossEntropyLoss")),
    )
    hooks = [
        dict(type="MaskDecayHook"),
        dict(type="mmengine.EMAHook"),
        dict(type=MaskDecayHook),
        dict(type="mmcastling.MaskDecayHook"),
        dict(type="EarlyStoppingHook"),
    ]
    cfg = Config(
        dict(model=model, custom_hooks=hooks, load_from="start.pth", resume=True)
    )
    before = copy.deepcopy(cfg.to_dict())
    deployed = deploy_config(cfg)
    first, second = deployed.model.parts
    assert first.backbone == dict(
        type="mmcastling.CastlingViT", arch="nano", deploy=True
    )
    assert second.deploy is True
    assert deployed.model.head == before["model"]["head"]
    assert deployed.custom_hooks == [dict(type="EarlyStoppingHook")]
    assert (deployed.load_from, deployed.resume) == (None, False)
    assert cfg.to_dict() == before


def test_a_config_without_hooks_stays_without():
    cfg = Config(dict(custom_hooks=None))
    drop_training_hooks(cfg)
    assert cfg.custom_hooks == []


def test_the_deployed_config_builds_what_switch_to_deploy_leaves(classifier_config):
    cfg = load_config(classifier_config)
    model = MODELS.build(cfg.model)
    deployed = switch_to_deploy(model)
    built = MODELS.build(deploy_config(cfg).model)
    built.load_state_dict(deployed.state_dict())
    assert built.backbone.deploy and not model.backbone.deploy
    images = torch.randn(2, 3, 64, 64)
    expected = features(deployed.eval(), images)
    assert_close(features(built.eval(), images), expected, rtol=0, atol=0)
    # The branch is on in the model that was built for training.
    set_mask(model, 0.0)
    assert (features(model.eval(), images)[0] - expected[0]).abs().max() > 1e-4


# -- how far apart ---------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def extract_feat(self, images):
        return {"low": [images * self.factor], "high": (images[..., ::2, ::2],)}


def test_all_feature_maps_of_all_batches_are_compared():
    batches = [torch.full((1, 3, 4, 4), value) for value in (1.0, -8.0, 2.0)]
    assert largest_difference(Scale(1.0), Scale(1.0), batches) == (0.0, 8.0)
    difference, magnitude = largest_difference(Scale(1.0), Scale(1.5), batches)
    assert (difference, magnitude) == (4.0, 8.0)


def test_features_that_are_not_finite_are_not_taken_for_equal():
    images = torch.ones(1, 3, 4, 4)
    images[0, 0, 0, 0] = float("nan")
    batches = [torch.ones(1, 3, 4, 4), images, torch.ones(1, 3, 4, 4)]
    difference, _ = largest_difference(Scale(1.0), Scale(1.0), batches)
    assert np.isnan(difference)


def test_models_with_other_numbers_of_features_cannot_be_compared():
    with pytest.raises(ValueError, match="zip"):
        largest_difference(Scale(1.0), nn.Identity(), [torch.ones(1, 3, 4, 4)])


def test_features_are_taken_without_gradients():
    layer = nn.Conv2d(3, 1, 1)
    (feature,) = features(layer, torch.ones(1, 3, 2, 2))
    assert not feature.requires_grad
