"""Linear layers in half precision: packed once, and nothing converted in vain."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mmcastling.attention.fast import apply_then
from mmcastling.attention.recording import is_watched
from mmcastling.deploy import precision as module
from mmcastling.deploy import set_precision
from mmcastling.deploy.half import HalfLinear, halve_linear
from mmcastling.models import CastlingViT

LAYERS = 3


def lowered(monkeypatch, **options):
    monkeypatch.setattr(module, "computes_in", lambda dtype, device: True)
    arch = dict(embed_dims=24, num_layers=LAYERS, num_heads=2, feedforward_channels=48)
    options = dict(img_size=32, patch_size=8, out_type="featmap", **options)
    model = CastlingViT(arch, deploy=True, **options).eval().requires_grad_(False)
    set_precision(model, "bf16")
    return model


class Conversions(TorchDispatchMode):
    """Counts them, by whether a weight is what is converted, and to what."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.data_ptr() for p in model.parameters()}
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            is_weight = args[0].data_ptr() in self.weights
            self.found["weight" if is_weight else result.dtype] += 1
        return result


def test_only_norms_and_the_image_are_rounded_between_layers(monkeypatch):
    model = lowered(monkeypatch)
    with Conversions(model) as conversions, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    mixed = 1  # what attention normalised in float32
    assert conversions.found[torch.bfloat16] == 1 + LAYERS * (2 + mixed)
    assert conversions.found["weight"] == 0


def test_layers_of_the_backbone_can_be_fused(monkeypatch):
    model = lowered(monkeypatch)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert {type(layer) for layer in linear} == {HalfLinear}
    assert not any(is_watched(layer) for layer in linear)


@pytest.fixture
def layer():
    """In float32, which oneDNN computes in on any machine."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).requires_grad_(False)
    assert halve_linear(layer, torch.float32) and type(layer) is HalfLinear
    return layer


def expected(layer, x):
    return nn.functional.gelu(nn.functional.linear(x, layer.weight, layer.bias))


def test_the_weight_is_packed_once_for_any_number_of_rows(layer, monkeypatch):
    gelu = nn.GELU()
    for rows in ((3,), (2, 50), (1, 4, 7)):
        x = torch.randn(*rows, 24)
        assert_close(apply_then(layer, gelu, x), expected(layer, x))
        packed = layer._packed[1]
        assert layer(x).shape == (*rows, 40) and layer._packed[1] is packed
    assert layer(torch.zeros(0, 24)).shape == (0, 40)


def test_a_weight_that_has_changed_is_packed_again(layer):
    x = torch.randn(5, 24)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert_close(apply_then(layer, nn.GELU(), x), expected(layer, x))
    layer.load_state_dict(nn.Linear(24, 40).state_dict())
    assert_close(apply_then(layer, nn.GELU(), x), expected(layer, x))
    layer.weight = nn.Parameter(torch.zeros(40, 24), requires_grad=False)
    assert_close(layer(x), layer.bias.expand(5, -1))


def test_it_is_copied_and_pickled_without_what_is_packed(layer):
    x = torch.randn(5, 24)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._packed is None
        assert_close(other(x), y, rtol=0, atol=0)


def test_a_gradient_flows_through(layer):
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).sum().backward()
    assert_close(x.grad, layer.weight.sum(0).expand(5, -1))


def test_weights_of_inference_mode_are_used_as_they_are(layer):
    with torch.inference_mode():
        other = copy.deepcopy(layer)
        x = torch.randn(5, 24)
        assert_close(other(x), layer(x))


def test_what_is_not_plainly_linear_keeps_its_class():
    class Cosine(nn.Linear):
        pass

    patched = nn.Linear(2, 2)
    patched.forward = patched.forward
    for other in (Cosine(2, 2), nn.Conv2d(2, 2, 1), patched):
        kind = type(other)
        assert not halve_linear(other, torch.bfloat16) and type(other) is kind
