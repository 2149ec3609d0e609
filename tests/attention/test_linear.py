"""Fused linear layers: the same function, by oneDNN where it serves."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mmcastling.analysis import count_macs
from mmcastling.attention.fast import FusedLinear, fuse_linear

ACTIVATIONS = {
    "none": None,
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "relu": nn.ReLU(),
    "hardswish": nn.Hardswish(),
}
LAYOUTS = {
    "tokens": lambda: torch.randn(2, 7, 24),
    "channels apart": lambda: torch.randn(2, 24, 7).transpose(1, 2),
    "every second": lambda: torch.randn(2, 14, 24)[:, ::2],
    "a row": lambda: torch.randn(24),
    "four axes": lambda: torch.randn(2, 3, 4, 24),
    "no rows": lambda: torch.randn(2, 0, 24),
}
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


class Calls(TorchDispatchMode):
    """Whether oneDNN's fused layer was called."""

    fused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused |= func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


def calls_onednn(layer, x):
    with Calls() as calls:
        layer(x)
    return calls.fused


def plain_and_fused(activation=None, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    plain = nn.Sequential(linear, copy.deepcopy(activation) or nn.Identity())
    fused = copy.deepcopy(linear)
    assert isinstance(fuse_linear(fused, activation), nn.Identity)
    return plain, fused


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_is_the_layer_and_then_the_activation(name, bias, layout):
    plain, fused = plain_and_fused(ACTIVATIONS[name], bias)
    x = 3.0 * LAYOUTS[layout]()
    with torch.inference_mode():
        assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_inference_is_onednns(grad_mode):
    _, fused = plain_and_fused(nn.GELU())
    with grad_mode():
        assert calls_onednn(fused, torch.randn(3, 24))
    fused.requires_grad_(False)
    assert calls_onednn(fused, torch.randn(3, 24))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_those_of_the_layer_and_the_activation(name):
    plain, fused = plain_and_fused(ACTIVATIONS[name])
    for frozen in (False, True):
        plain.requires_grad_(not frozen)
        fused.requires_grad_(not frozen)
        grads = []
        for layer in (plain, fused):
            x = torch.linspace(-2, 2, 72).reshape(3, 24).requires_grad_()
            layer(x).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in layer.parameters())])
        assert_close(*grads)


def test_a_bias_alone_can_be_trained():
    _, fused = plain_and_fused()
    fused.weight.requires_grad_(False)
    fused(torch.randn(3, 24)).sum().backward()
    assert_close(fused.bias.grad, torch.full((40,), 3.0))


class Wrapped(torch.Tensor):
    """Any tensor of a class of its own, as quantisation and parallelism have."""


def wrapped_weight(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Wrapped), False)


@pytest.mark.parametrize(
    ("prepare", "dtype"),
    [(nn.Module.double, torch.float64), (wrapped_weight, torch.float32)],
    ids=["double", "subclass"],
)
def test_what_onednn_does_not_know_is_torchs(prepare, dtype):
    plain, fused = plain_and_fused(nn.GELU())
    plain.to(dtype)
    prepare(fused)
    x = torch.randn(3, 24, dtype=dtype)
    with torch.no_grad():
        assert not calls_onednn(fused, x)
        assert_close(torch.Tensor(fused(x)).to(dtype), plain(x))


def test_autocast_rules_as_over_any_layer():
    plain, fused = plain_and_fused(nn.GELU())
    x = torch.randn(3, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == plain(x).dtype == torch.bfloat16
        assert_close(fused(x), plain(x))


def test_a_switch_turns_onednn_off():
    _, fused = plain_and_fused()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert not calls_onednn(fused, torch.randn(3, 24))


def test_graphs_hold_the_layer_itself():
    """So that they run, or can be written, wherever a linear layer can."""
    _, fused = plain_and_fused(nn.GELU())
    x = torch.randn(3, 24)
    with torch.no_grad():
        traced = torch.jit.trace(fused, x)
        exported = torch.export.export(fused, (x,))
    assert "mkldnn" not in str(traced.inlined_graph)
    assert "mkldnn" not in str(exported.graph)
    assert_close(traced(x), fused(x))
    assert_close(exported.module()(x), fused(x))


def test_fusing_keeps_parameters_hooks_and_references():
    linear = nn.Linear(24, 40)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    weight, names = linear.weight, list(linear.state_dict())
    assert isinstance(fuse_linear(linear, nn.ReLU()), nn.Identity)
    assert isinstance(linear, FusedLinear) and linear.weight is weight
    assert list(linear.state_dict()) == names
    with torch.no_grad():
        out = linear(torch.randn(3, 24))
    assert seen and out.min() == 0


def test_fusing_again_changes_nothing():
    _, fused = plain_and_fused(nn.ReLU())
    fuse_linear(fused)
    fuse_linear(fused, nn.Identity())
    assert isinstance(fused.activation, nn.ReLU)


def test_an_unknown_activation_stays_behind():
    tanh = nn.Tanh()
    assert fuse_linear(nn.Linear(2, 3), tanh) is tanh


class LowRank(nn.Linear):
    """A layer with a forward of its own, as finetuning libraries have."""

    def forward(self, x):
        return super().forward(x) + x.mean()


@pytest.mark.parametrize("layer", [LowRank(2, 3), nn.Identity(), nn.Bilinear(2, 2, 3)])
def test_what_is_not_exactly_a_linear_layer_stays(layer):
    kind, relu = type(layer), nn.ReLU()
    assert fuse_linear(layer, relu) is relu
    assert type(layer) is kind


def test_macs_are_those_of_the_layer():
    plain, fused = plain_and_fused(nn.GELU())
    x = torch.randn(2, 5, 24)
    assert count_macs(fused, x).macs == count_macs(plain, x).macs == 2 * 5 * 24 * 40
