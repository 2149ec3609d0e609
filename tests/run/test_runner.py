"""What the commands load into a model before they run it."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from mmcastling.attention import MaskThreshold
from mmcastling.deploy import deploy_checkpoint
from mmcastling.models import CastlingLeViT
from mmcastling.registry import type_name
from mmcastling.run import ConfigError
from mmcastling.run import runner as runner_module
from mmcastling.run.load import load_model
from mmcastling.verbs import MASK_META_KEY, castling_modules, switch_to_deploy

ARCH = dict(embed_dims=[32], key_dims=[8], num_heads=[2], depths=[1])


def built(seed):
    torch.manual_seed(seed)
    return CastlingLeViT(ARCH, out_indices=(0,)).eval()


def test_a_deployed_checkpoint_loads_into_the_model_of_its_training_config():
    """Its batch norms are folded away, so the model must be deployed before."""
    deployed = switch_to_deploy(built(0))
    model = built(1)
    load_model(None, deploy_checkpoint(deployed, {}), "deployed.pth", model=model)
    assert not list(castling_modules(model))
    x = torch.randn(1, 3, 64, 64)
    assert_close(model(x)[0], deployed(x)[0], rtol=0, atol=0)


def test_a_training_checkpoint_brings_its_masks():
    source, model = built(0), built(1)
    state = dict(threshold="4/N", weight=0.5)
    checkpoint = dict(meta={MASK_META_KEY: state}, state_dict=dict(source.state_dict()))
    load_model(None, checkpoint, "epoch_1.pth", model=model)
    for _, module in castling_modules(model):
        assert module.branch.threshold == MaskThreshold.parse("4/N")
        assert module.branch.weight == 0.5
    x = torch.randn(1, 3, 64, 64)
    load_model(None, checkpoint, "epoch_1.pth", model=source)
    assert_close(model(x)[0], source(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Resize", "Resize"),
        ("mmdet.Resize", "Resize"),
        (MaskThreshold, "MaskThreshold"),
    ],
)
def test_a_type_is_named_without_its_scope(kind, name):
    assert type_name(kind) == name


# -- heads and data --------------------------------------------------------------------


def head(count, **kwargs):
    module = torch.nn.Identity()
    module.num_classes = count
    for key, value in kwargs.items():
        setattr(module, key, value)
    return module


def detector(**parts):
    model = torch.nn.Module()
    model.backbone = head(1000)  # none of the data's
    for name, part in parts.items():
        model.add_module(name, part)
    return model


ROI = dict(bbox_head=torch.nn.ModuleList([head(3), head(3)]), mask_head=head(3))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(bbox_head=head(3)), None),
        (dict(roi_head=detector(**ROI), rpn_head=head(1)), None),
        (dict(rpn_head=detector(bbox_head=head(1)), bbox_head=head(3)), None),
        (dict(mask_head=head(1, class_agnostic=True)), None),
        (dict(bbox_head=head(80), language_model=head(1)), None),
        (dict(semantic_head=head(183)), None),
        (dict(bbox_head=head(1)), "model.bbox_head.num_classes is 1, but .* 3 classes"),
        (dict(bbox_head=head(80)), "model.bbox_head.num_classes is 80"),
        (
            dict(roi_head=detector(bbox_head=torch.nn.ModuleList([head(3), head(2)]))),
            "model.roi_head.bbox_head.1.num_classes is 2",
        ),
        (dict(auxiliary_head=head(2)), "model.auxiliary_head.num_classes is 2"),
        (dict(head=head(2)), "model.head.num_classes is 2"),
        (dict(head=head(1000)), "warning"),  # mmpretrain trains it, and evaluates it
    ],
)
def test_heads_have_the_classes_of_the_data(parts, message):
    warnings = []
    runner = SimpleNamespace(
        model=detector(**parts), logger=SimpleNamespace(warning=warnings.append)
    )
    loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes="abc")))
    hook = runner_module._CheckModelHook()
    if message in (None, "warning"):
        hook._check(runner, loader)
        assert len(warnings) == (message == "warning")
    else:
        with pytest.raises(ConfigError, match=message):
            hook._check(runner, loader)
        assert warnings == []
