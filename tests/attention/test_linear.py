"""Linear layers in one pass: the same function, by oneDNN where it serves."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.profiler import profile
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmcastling.analysis import count_macs
from mmcastling.attention.fast import apply_layer, apply_then, fused_inside

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


def calls_onednn(layer, x):
    with profile() as calls:  # which looks on from below
        layer(x)
    return any(
        "mkldnn::_linear_pointwise" in event.name for event in calls.function_events
    )


class Fused(nn.Module):
    """A layer and its activation, as an MLP holds and calls them."""

    def __init__(self, linear, activation):
        super().__init__()
        self.layer, self.activation = linear, activation or nn.Identity()

    def forward(self, x):
        return apply_then(self.layer, self.activation, x)


def plain_and_fused(activation=None, bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    plain = nn.Sequential(linear, copy.deepcopy(activation) or nn.Identity())
    return plain, Fused(copy.deepcopy(linear), activation)


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
    fused.layer.weight.requires_grad_(False)
    fused(torch.randn(3, 24)).sum().backward()
    assert_close(fused.layer.bias.grad, torch.full((40,), 3.0))


class Wrapped(torch.Tensor):
    """Any tensor of a class of its own, as quantisation and parallelism have."""


def wrapped_weight(fused):
    weight = fused.layer.weight.detach().as_subclass(Wrapped)
    fused.layer.weight = nn.Parameter(weight, False)


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


class LowRank(nn.Linear):
    """A layer with a forward of its own, as finetuning libraries have."""

    def forward(self, x):
        return super().forward(x) + x.mean()


@torch.no_grad()
@pytest.mark.parametrize("layer", [LowRank(24, 3), nn.Identity(), nn.LayerNorm(24)])
def test_what_is_not_exactly_a_linear_layer_is_called(layer):
    x = torch.randn(3, 24)
    assert not calls_onednn(functools.partial(apply_layer, layer), x)
    assert_close(apply_then(layer, nn.GELU(), x), nn.GELU()(layer(x)))


class Foreign(nn.Module):
    """A forward of another library, which calls its layer itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(24, 24), []

    def forward(self, x):
        if x.isnan().any():
            raise ValueError("no number")
        return self.layer(x)


@needs_onednn
@torch.no_grad()
def test_layers_inside_a_foreign_forward_are_linear_again_behind_it():
    holder, x = Foreign(), torch.randn(3, 24)
    expected = holder(x)

    def inside(x):
        with fused_inside(holder):
            return holder(x)

    assert calls_onednn(inside, x) and type(holder.layer) is nn.Linear
    assert_close(inside(x), expected)
    with pytest.raises(ValueError, match="no number"):
        inside(x * torch.nan)
    assert type(holder.layer) is nn.Linear
    with FlopCounterMode(display=False) as counter:
        inside(x)
    assert counter.get_total_flops() == 2 * 3 * 24 * 24
    handle = holder.layer.register_forward_hook(add_one)
    assert not calls_onednn(inside, x)
    assert_close(inside(x), expected + 1.0)
    handle.remove()
    assert calls_onednn(inside, x)


# -- nothing hides anything ------------------------------------------------------------


class Forwarding(nn.Module):
    """A wrapper that adds to a layer, and answers for what it does not know itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1.0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def add_one(module, inputs, output):
    return output + 1.0


def patched(fused):
    forward = fused.layer.forward
    fused.layer.forward = lambda x: forward(x) + 1.0


def wrapped(fused):
    fused.layer = Forwarding(fused.layer)


ADDING_ONE = {
    "hook": lambda fused: fused.layer.register_forward_hook(add_one),
    "patched forward": patched,
    "wrapper": wrapped,
    "pre-hook of the activation": lambda fused: (
        fused.activation.register_forward_pre_hook(lambda _, x: (x[0] + 1.0,))
    ),
}


@pytest.mark.parametrize("name", ADDING_ONE)
def test_what_stands_between_layer_and_activation_acts_there(name):
    plain, fused = plain_and_fused(nn.GELU())
    x = torch.randn(3, 24)
    ADDING_ONE[name](fused)
    with torch.no_grad():
        assert_close(fused(x), plain[1](plain[0](x) + 1.0))


def test_hooks_on_all_modules_see_the_layer_before_its_activation():
    plain, fused = plain_and_fused(nn.GELU())
    seen, x = {}, torch.randn(3, 24)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.update({type(module): output})
    )
    with torch.no_grad():
        fused(x)
        handle.remove()
        assert_close(seen[nn.Linear], plain[0](x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_a_number_stays_so(name):
    _, fused = plain_and_fused(ACTIVATIONS[name])
    x = torch.randn(3, 24)
    x[1, 2] = torch.nan
    with torch.no_grad():
        assert fused(x).isnan().any(dim=1).tolist() == [False, True, False]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_layer():
    _, fused = plain_and_fused(nn.GELU())
    x = torch.randn(3, 24)
    with torch.no_grad():
        with Seen() as seen:
            fused(x)
        assert "aten.addmm.default" in seen.names
        with SeenFunctions() as functions:
            fused(x)
        assert "linear" in functions.names
        with FlopCounterMode(display=False) as counter:
            fused(x)
        assert counter.get_total_flops() == 2 * 3 * 24 * 40
        with torch.device("cpu"):  # which sees nothing
            assert calls_onednn(fused, x)


def jvp_by_dual_numbers(function, x, tangent):
    with torch.no_grad(), forward_ad.dual_level():
        out = function(forward_ad.make_dual(x, tangent))
        return forward_ad.unpack_dual(out).tangent


def jvp_by_transform(function, x, tangent):
    with torch.no_grad():
        return torch.func.jvp(function, (x,), (tangent,))[1]


@pytest.mark.parametrize("jvp", [jvp_by_dual_numbers, jvp_by_transform])
def test_forward_mode_differentiates_the_layer(jvp):
    plain, fused = plain_and_fused(nn.GELU())
    x, tangent = torch.randn(2, 3, 24)
    expected = jvp(plain, x, tangent)
    assert expected.abs().max() > 0.1
    assert_close(jvp(fused, x, tangent), expected)


def test_vmap_maps_the_layer():
    plain, fused = plain_and_fused(nn.GELU())
    x = torch.randn(5, 3, 24)
    with torch.no_grad():
        assert_close(torch.func.vmap(fused)(x), plain(x))


def test_macs_are_those_of_the_layer():
    plain, fused = plain_and_fused(nn.GELU())
    x = torch.randn(2, 5, 24)
    assert count_macs(fused, x).macs == count_macs(plain, x).macs == 2 * 5 * 24 * 40
