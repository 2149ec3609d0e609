"""The state of the masks goes with the weights, through whatever loads them."""

import copy
import logging

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import load_checkpoint, save_checkpoint
from mmengine.runner.checkpoint import get_state_dict, weights_to_cpu
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmcastling.attention import Attention, MaskThreshold
from mmcastling.checkpoint import load_checkpoint as read
from mmcastling.checkpoint import load_weights, weights_of
from mmcastling.deploy import deploy_checkpoint, select_weights
from mmcastling.models import CastlingViT
from mmcastling.train import mask_decay_hook
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

NAME = "castling_tiny_in1k"
SMALL = dict(arch="nano", img_size=32, ffn_conv=5)
HEAD = dict(num_classes=2, in_channels=128)
# What must come back, bit for bit; the third is on, by less than six digits show.
STATES = {
    "off": ("1", 1.0),
    "faded": ("0.02", 0.0),
    "almost off": (0.9999996, 0.1234567891),
    "in units of 1/N": ("0.1234567891+2.000000001/N", 1.0),
}


def states_of(model):
    return {
        (module.branch.threshold, module.branch.weight)
        for _, module in castling_modules(model)
    }


def one(state):
    threshold, weight = STATES[state]
    return {(MaskThreshold.parse(threshold), weight)}


@pytest.fixture(scope="module")
def classifier():
    import mmpretrain

    return mmpretrain.get_model(NAME, backbone=SMALL, head=HEAD).eval()


def by_get_model(path, model):
    import mmpretrain

    return mmpretrain.get_model(NAME, pretrained=str(path), backbone=SMALL, head=HEAD)


def by_timm(path, model):
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "castling_vit_nano", num_classes=2, img_size=32, checkpoint_path=str(path)
    )


def by_torch(path, model):
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return model


def by_our_loader(path, model):
    load_weights(model, read(path), str(path))
    return model


def by_averaged_weights(path, model):
    """As a checkpoint of ``EMAHook`` holds the raw ones, under a wrapper's names."""
    average = ExponentialMovingAverage(by_torch(path, copy.deepcopy(model)))
    torch.save({"state_dict": average.state_dict()}, path)
    load_checkpoint(model, str(path), "cpu")
    return model


def by_init_cfg(path, model):
    part = dict(type="Pretrained", checkpoint=str(path), prefix="backbone.")
    backbone = CastlingViT(**SMALL, init_cfg=part)
    backbone.init_weights()
    return backbone


LOADERS = [
    *(by_get_model, by_timm, by_torch, by_our_loader, by_averaged_weights, by_init_cfg)
]


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_every_loader_brings_the_masks_back(load, classifier, tmp_path):
    path, source = tmp_path / "weights.pth", copy.deepcopy(classifier)
    set_mask(source, *STATES["in units of 1/N"])
    weights = weights_to_cpu(get_state_dict(source))  # as MMEngine saves them
    assert set(weights) == set(dict(source.named_parameters()))
    save_checkpoint({"state_dict": weights}, str(path))
    model = load(path, copy.deepcopy(classifier))
    assert states_of(model) == one("in units of 1/N")


@pytest.mark.parametrize("state", STATES)
def test_the_state_comes_back_as_it_was(state):
    source, model = Attention(8, 2), Attention(8, 2)
    set_mask(source, *STATES[state])
    model.load_state_dict(copy.deepcopy(source.state_dict()))
    assert states_of(model) == one(state)
    assert model.mixer.mask_is_on == (state not in ("off", "faded"))
    again = MaskThreshold.parse(str(source.mixer.branch.threshold))
    assert again == source.mixer.branch.threshold


def test_each_attention_has_its_own():
    source, model = (nn.Sequential(Attention(8, 2), Attention(8, 2)) for _ in range(2))
    set_mask(source[0], "3/N"), set_mask(source[1], 0.5, 0.25)
    model.load_state_dict(source.state_dict())
    found = [
        (str(m.branch.threshold), m.branch.weight) for _, m in castling_modules(model)
    ]
    assert found == [("3/N", 1.0), ("0.5", 0.25)]


def test_a_detector_and_its_inferencer_have_it(detector_config, tmp_path):
    from mmdet.apis import DetInferencer, init_detector

    config, path = str(detector_config), tmp_path / "weights.pth"
    model = init_detector(config, device="cpu")
    set_mask(model, *STATES["off"])
    meta = dict(dataset_meta=dict(classes=("person",)))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)
    assert states_of(init_detector(config, str(path), device="cpu")) == one("off")
    inferencer = DetInferencer(config, str(path), device="cpu")
    assert states_of(inferencer.model) == one("off")


def test_weights_of_a_deployed_model_turn_the_branch_off():
    source, model = Attention(8, 2), Attention(8, 2)
    written = deploy_checkpoint(switch_to_deploy(source), {})
    model.load_state_dict(written["state_dict"])
    assert not model.mixer.mask_is_on
    deployed = Attention(8, 2, deploy=True)
    set_mask(source, "4/N")
    deployed.load_state_dict(source.state_dict())
    assert deployed.mixer.branch is None


def test_raw_weights_beside_averaged_ones_have_it():
    source, model = Attention(8, 2), Attention(8, 2)
    set_mask(source, 1.0)
    weights = source.state_dict()
    raw = {f"module.{name}": value for name, value in weights.items()}
    checkpoint = dict(state_dict=weights, ema_state_dict=raw)
    model.load_state_dict(select_weights(checkpoint, ema=False))
    assert not model.mixer.mask_is_on
    assert weights_of({"weight": torch.ones(1)}) == {"weight": torch.ones(1)}


def test_weights_without_a_state_leave_it_as_it_is_and_it_is_said(caplog):
    model = nn.Sequential(Attention(8, 2), Attention(8, 2))
    weights = dict(model.state_dict())
    set_mask(model, "4/N")
    with caplog.at_level(logging.WARNING, "mmcastling"):
        model.load_state_dict(weights)
    assert {str(m.branch.threshold) for _, m in castling_modules(model)} == {"4/N"}
    (said,) = [r.getMessage() for r in caplog.records if r.name == "mmcastling"]
    assert "0.mixer keeps threshold 4/N" in said and "set_mask" in said

    caplog.clear()
    set_mask(model, 1.0)
    model.load_state_dict(weights)  # as today, and nothing to say
    softmax = {k: v for k, v in weights.items() if "local_conv" not in k}
    model.load_state_dict(softmax, strict=False)  # never had a mask
    assert not [r for r in caplog.records if r.name == "mmcastling"]


# -- densities -------------------------------------------------------------------------


def test_densities_lie_on_one_device(monkeypatch):
    """An attention that was never trained has its first density, on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    stack, devices = torch.stack, set()

    def stacking(tensors):  # fake tensors of no axes may lie anywhere, real ones not
        devices.update(tensor.device.type for tensor in tensors)
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", stacking)
    with FakeTensorMode(), torch.device("cuda"):
        model = nn.Sequential(Attention(8, 2), Attention(8, 2))
        model[1].mixer.branch.density = torch.ones((), device="cuda")
        assert mask_decay_hook._densities(model).shape == (2,)
    assert devices == {"cuda"}


@pytest.mark.parametrize("library", ["torch", "ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_averages_of_torch_and_timm_follow(library):
    model = nn.Sequential(Attention(8, 2), Attention(8, 2))
    if library == "torch":
        average = AveragedModel(model)
        update, copied = average.update_parameters, average.module
    else:
        average = getattr(pytest.importorskip("timm.utils"), library)(model)
        update = average.update
        copied = average.ema if library == "ModelEma" else average.module
    for state in ("in units of 1/N", "off"):
        set_mask(model, *STATES[state])
        update(model)
        assert states_of(copied) == one(state)
