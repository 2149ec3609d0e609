"""docs/distillation.md: what it shows works as it stands."""

import copy
import re
import textwrap

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, init_default_scope
from mmpretrain.structures import DataSample

import mmcastling
from mmcastling.run import load_config
from mmcastling.run.conversion import deploy_config
from mmcastling.train import MaskDecayHook


@pytest.fixture(scope="module")
def blocks(root):
    text = (root / "docs" / "distillation.md").read_text()
    found = re.findall(r"^ *```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def samples():
    return [DataSample().set_gt_label(label) for label in (1, 7)]


def test_the_config_finetunes_a_castled_network_with_its_softmax_self(
    blocks, samples, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "castled.py").write_text(blocks[0])
    cfg = load_config("castled.py")
    softmax = MODELS.build(copy.deepcopy(cfg.model.teacher))
    torch.save({"state_dict": softmax.state_dict()}, cfg.load_from)

    student = MODELS.build(cfg.model)
    student.init_weights()
    weights = torch.load(cfg.load_from, weights_only=True)["state_dict"]
    missing, unexpected = student.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing and all("local_conv" in name for name in missing)
    losses = student.eval().loss(torch.randn(2, 3, 64, 64), samples)
    assert losses["loss_distillation"] > 0  # its attention is another
    (hook,) = cfg.custom_hooks
    assert isinstance(HOOKS.build(hook), MaskDecayHook)
    (mixer, *_) = mmcastling.castling_modules(student)
    assert str(mixer[1].branch.threshold) == hook["start"]  # in step from the first
    assert "teacher" not in deploy_config(cfg).pretty_text


def test_the_lines_for_a_distillation_token_make_a_recipe(blocks, samples, tmp_path):
    own = tmp_path / "distilled.py"
    base = "_base_ = ['mmcastling::castling/castling_tiny_in1k.py']\n"
    own.write_text(base + blocks[1])
    cfg = load_config(own)
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=32)
    cfg.model.backbone.update(arch=arch, img_size=32)
    cfg.model.head.update(in_channels=32)
    timm = pytest.importorskip("timm")
    cfg.model.teacher.update(model_name="resnet10t", pretrained=False)
    cfg.model.teacher_checkpoint = str(tmp_path / "teacher.pth")
    torch.save(
        timm.create_model("resnet10t").state_dict(), cfg.model.teacher_checkpoint
    )
    model = MODELS.build(cfg.model)
    model.init_weights()
    losses = model.loss(torch.randn(2, 3, 32, 32), samples)
    sum(losses.values()).backward()
    assert model.head.layers.head_dist.weight.grad.abs().sum() > 0
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decays = [
        group["weight_decay"]
        for group in optimizer.param_groups
        if group["params"][0] is model.backbone.dist_token
    ]
    assert decays == [0.0]
    assert MODELS.build(deploy_config(cfg).model).backbone.dist_token is not None


def test_the_code_distils(blocks, samples):
    init_default_scope("mmpretrain")
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=32)
    backbone = dict(type="VisionTransformer", arch=arch, img_size=32)
    head = dict(type="VisionTransformerClsHead", num_classes=10, in_channels=32)
    softmax = MODELS.build(dict(type="ImageClassifier", backbone=backbone, head=head))
    names = dict(
        softmax=softmax, inputs=torch.randn(2, 3, 32, 32), data_samples=samples
    )
    exec(blocks[2], names)
    assert set(names["losses"]) == {"loss", "loss_distillation"}
    assert len(list(mmcastling.castling_modules(names["model"]))) == 2
    assert not list(mmcastling.castling_modules(softmax))
