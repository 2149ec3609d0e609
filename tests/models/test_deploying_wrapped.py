"""Deployment of models that others have wrapped, hooked, pruned or tied."""

import copy
import functools
import logging

import pytest
import torch
from mmpretrain.models.utils import LayerScale
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.testing import assert_close

from mmcastling import castle, set_mask, switch_to_deploy
from mmcastling.attention import Attention
from mmcastling.attention.attention import LayerScale as OwnLayerScale
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.models import CastlingLeViT, CastlingViT
from mmcastling.models.heads import LeViTHead

SIZES = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
LEVIT = dict(embed_dims=[32, 48], key_dims=[8, 8], num_heads=[2, 3], depths=[1, 1])


class LoRA(nn.Module):
    """The shape of PEFT's layer: what it wraps, and a low-rank product beside it."""

    def __init__(self, base_layer, rank=2):
        super().__init__()
        self.base_layer = base_layer
        self.dropout = nn.Dropout(0.1)
        self.A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.B = nn.Linear(rank, base_layer.out_features, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.B(self.A(self.dropout(x)))


class SubclassedLoRA(nn.Linear):
    """The shape that PEFT had, a layer by type."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.B = nn.Linear(layer.in_features, layer.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.B(x)


class AlwaysDrops(nn.Dropout):
    """Monte Carlo dropout, here without chance."""

    def forward(self, x):
        return x * torch.linspace(0.5, 1.5, x.shape[-1])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * weight.sin()


PLACES = {  # of the layers of a block, by name
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "ffn.layers.0.0",
    "fc2": "ffn.layers.1",
    "gamma1": "attn.gamma1",
    "gamma2": "ffn.gamma2",
    "mlp": "ffn.layers",
    "drop": "attn.proj_drop",
    "drop2": "ffn.layers.2",
}


def put(block, place, module):
    holder, _, name = PLACES[place].rpartition(".")
    setattr(block.get_submodule(holder), name, module)


def at(block, place):
    return block.get_submodule(PLACES[place])


def patch_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x).sin()


WRAPPED = {
    **{
        f"LoRA on {place}": lambda b, p=place: put(b, p, LoRA(at(b, p)))
        for place in ("qkv", "proj", "fc1", "fc2")
    },
    **{
        f"subclassed LoRA on {place}": lambda b, p=place: put(
            b, p, SubclassedLoRA(at(b, p))
        )
        for place in ("proj", "fc1", "fc2")
    },
    **{
        f"spectral norm of {place}": lambda b, p=place: parametrizations.spectral_norm(
            at(b, p)
        )
        for place in ("proj", "fc2")
    },
    "old spectral norm of fc2": lambda b: spectral_norm(at(b, "fc2")),
    "weight norm of proj": lambda b: parametrizations.weight_norm(at(b, "proj")),
    "pruned proj": lambda b: prune.l1_unstructured(at(b, "proj"), "weight", 0.5),
    "pruned bias of fc2": lambda b: prune.l1_unstructured(at(b, "fc2"), "bias", 0.5),
    "pruned fc1": lambda b: prune.random_structured(at(b, "fc1"), "weight", 0.5, dim=0),
    "parametrized gamma": lambda b: parametrize.register_parametrization(
        at(b, "gamma2"), "weight", Doubled()
    ),
    **{
        f"hook on {place}": lambda b, p=place: at(b, p).register_forward_hook(
            lambda _, x, y: y.sin()
        )
        for place in ("qkv", "proj", "fc1", "fc2", "gamma1", "gamma2", "mlp", "drop")
    },
    **{
        f"pre-hook on {place}": lambda b, p=place: at(b, p).register_forward_pre_hook(
            lambda _, x: (x[0].sin(),)
        )
        for place in ("fc1", "fc2", "gamma2", "drop2")
    },
    "patched proj": lambda b: patch_forward(at(b, "proj")),
    "patched fc2": lambda b: patch_forward(at(b, "fc2")),
    "dropout that acts": lambda b: put(b, "drop", AlwaysDrops()),
    "dropout of an MLP that acts": lambda b: put(b, "drop2", AlwaysDrops()),
    "adapter for dropout": lambda b: put(b, "drop", nn.Linear(16, 16)),
}


def trained_like(kind, *args, **options):
    torch.manual_seed(0)
    backbone = kind(*args, **options).eval()
    set_mask(backbone, 1.0)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, (LayerScale, OwnLayerScale, _BatchNorm)):
                module.weight.uniform_(2.0, 4.0)
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.3)
    return backbone


@functools.cache
def built(family):
    if family == "levit":
        return trained_like(CastlingLeViT, LEVIT)
    options = dict(img_size=32, layer_scale_init_value=0.5, drop_rate=0.1)
    return trained_like(CastlingViT, SIZES, **options)


def vit():
    return copy.deepcopy(built("vit"))


def levit():
    return copy.deepcopy(built("levit"))


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_deploys(model):
    """On a copy and in place, and whatever is folded is folded rightly."""
    with torch.no_grad():
        expected = model(IMAGES)[-1]
        deployed = switch_to_deploy(model, example=IMAGES)
        tolerance = dict(rtol=0, atol=1e-5 * float(expected.abs().max()))
        assert_close(deployed(IMAGES)[-1], expected, **tolerance)
        switch_to_deploy(model, inplace=True)
        assert_close(model(IMAGES)[-1], expected, **tolerance)
    return deployed


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_layer_is_left_and_the_others_are_folded(name, caplog):
    model = vit()
    WRAPPED[name](model.layers[1])
    model.eval()
    with caplog.at_level(logging.WARNING, "mmcastling"):
        deployed = assert_deploys(model)
    kinds = (LayerScale, OwnLayerScale)
    left = [n for n, m in deployed.named_modules() if isinstance(m, kinds)]
    assert all(where.startswith("layers.1.") for where in left) and len(left) <= 1
    for where in left:
        assert f"deployment: {where}" in caplog.text


def tied_weights(model):
    first, second = (block.attn.proj for block in model.layers)
    second.weight, second.bias = first.weight, first.bias


def tied_modules(model):
    first, second = model.layers
    second.attn.proj, second.ffn.layers[1] = first.attn.proj, first.ffn.layers[1]
    second.ffn.layers[0] = first.ffn.layers[0]


def tied_activations(model):
    first, second = model.layers
    second.ffn.layers[0][1] = first.ffn.layers[0][1]
    second.ffn.layers[0][0] = first.attn.proj.__class__(16, 32)


def one_mlp(model):
    model.layers[1].ffn = model.layers[0].ffn


def held_elsewhere(model):
    model.extra = nn.ModuleList([model.layers[0].attn.proj])  # perhaps called there


TIES = (tied_weights, tied_modules, tied_activations, one_mlp, held_elsewhere)


@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.__name__)
def test_what_is_used_twice_is_folded_once_for_each(tie):
    model = vit()
    tie(model)
    before = copy.deepcopy(model.layers[0].attn.proj)
    held = model.layers[0].attn.proj
    assert_deploys(model.eval())
    assert_close(held.weight, before.weight, rtol=0, atol=0)


def no_statistics(model):
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = None


def lora_in_a_pair(model):
    pair = model.stages[0][0].block.qkv
    pair.linear = LoRA(pair.linear)


def tied_pairs(model):
    first, second = (model.stages[0][1].block, model.stages[0][3].block)
    second.linear1 = first.linear1
    second.linear2.linear = first.linear2.linear


BATCH_NORMS = {
    "no statistics": no_statistics,
    "LoRA": lora_in_a_pair,
    "tied": tied_pairs,
    "pruned": lambda m: prune.l1_unstructured(
        m.stages[0][0].block.qkv.linear, "weight", 0.5
    ),
    "spectral norm": lambda m: parametrizations.spectral_norm(
        m.patch_embed.patch_embed[0].conv
    ),
    "hook on a norm": lambda m: m.stages[0][1].block.linear1.bn.register_forward_hook(
        lambda _, x, y: y.sin()
    ),
    "hook on a pair": lambda m: m.stages[0][1].block.linear1.register_forward_hook(
        lambda _, x, y: y.sin()
    ),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norms_are_folded_only_where_they_are_constant(name):
    model = (
        levit()
        if name != "tied"
        else trained_like(CastlingLeViT, LEVIT | dict(depths=[2, 1]))
    )
    BATCH_NORMS[name](model)
    assert_deploys(model.eval())


def test_a_head_without_statistics_is_left():
    torch.manual_seed(0)
    head = LeViTHead(3, 8, distillation=True).eval()
    no_statistics(head.head)
    nn.init.uniform_(head.head_dist.bn.running_mean)
    feats = (torch.randn(5, 8),)
    expected = head(feats)
    deployed = switch_to_deploy(head)
    assert_close(deployed(feats), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(deployed.head_dist, nn.Linear)
    assert not isinstance(deployed.head, nn.Linear)


def test_low_rank_matrices_added_after_deployment_act_on_the_layer():
    """No layer hides an activation, whoever goes by its type."""
    expected, wrapped = vit(), switch_to_deploy(vit())
    for model in (expected, wrapped):
        for block in model.layers:
            lora = LoRA(block.ffn.layers[0][0], rank=16)
            lora.A.weight.data = torch.eye(16)
            lora.B.weight.data = torch.linspace(-1, 1, 512).view(32, 16)
            block.ffn.layers[0][0] = lora
    with torch.no_grad():
        found = wrapped.eval()(IMAGES)
        assert_close(found, expected.eval()(IMAGES), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", ["qkv", "proj", "mlp.fc1"])
def test_castled_models_of_timm_with_low_rank_matrices(place):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = dict(img_size=32, embed_dim=16, num_heads=2, depth=2, init_values=0.5)
    model = castle(timm.create_model("vit_tiny_patch16_224", **options)).eval()
    set_mask(model, 1.0)
    for block in model.blocks:
        holder = block.mlp if "fc1" in place else block.attn
        name = place.removeprefix("mlp.")
        setattr(holder, name, LoRA(getattr(holder, name)))
    switch_to_deploy(model.eval(), example=IMAGES)


# -- the comparison, and what is said --------------------------------------------------


class Breaks(nn.Module):
    """Anything whose deployed form is another function."""

    def __init__(self, factor=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.deploy_factor, self.factor = factor, 1.0

    def forward(self, x, add=0.0):
        return dict(out=[self.factor * self.weight * x + add], names="no tensor")

    def switch_to_deploy(self):
        self.factor = self.deploy_factor


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [2.0, torch.nan])
def test_a_changed_output_is_an_error_and_the_model_stays(factor, inplace):
    model = Breaks(factor).train()
    with pytest.raises(UnavailableError, match=r"its output by (1|nan), where"):
        switch_to_deploy(model, inplace, example=torch.ones(3))
    assert model.factor == 1.0 and model.training
    if factor == 2.0:
        switch_to_deploy(model, inplace, example=torch.ones(3), tolerance=1.0)


@pytest.mark.parametrize(
    "example", [(torch.ones(3), 2.0), dict(x=torch.ones(3), add=1)]
)
def test_examples_are_one_or_several_arguments(example):
    switch_to_deploy(Breaks(1.0), example=example)
    with pytest.raises(UnavailableError, match="changes its output"):
        switch_to_deploy(Breaks(1.1), example=example)


def test_an_example_without_an_output_is_refused():
    class Silent(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(OptionError, match="Silent returns no tensors"):
        switch_to_deploy(Silent(), example=torch.ones(1))


def test_a_branch_that_is_on_is_said_once(caplog):
    model = vit()
    set_mask(model, "4/N", 0.5)
    with caplog.at_level(logging.WARNING, "mmcastling"):
        switch_to_deploy(model)
        (said,) = [r.getMessage() for r in caplog.records]
        assert "layers.0.attn.mixer, layers.1.attn.mixer" in said
        assert "was on (threshold 4/N, weight 0.5): the output changes" in said
        caplog.clear()
        copy.deepcopy(model).switch_to_deploy()  # the backbone's own
        assert len(caplog.records) == 1
        caplog.clear()
        set_mask(model, 1.0)
        switch_to_deploy(model)
        CastlingViT(SIZES, img_size=32, deploy=True)
        levit_built = CastlingLeViT(LEVIT, deploy=True)
        Attention(8, 2, deploy=True)
        switch_to_deploy(levit_built)
    assert not caplog.records
    set_mask(model, "1/N")
    with pytest.raises(UnavailableError, match="train until the masks are off"):
        switch_to_deploy(model, example=IMAGES)
