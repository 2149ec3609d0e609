"""What counts, traces, quantises or rewrites models sees ordinary layers in ours.

The same table, of tools and models, stands in docs/limits.md.
"""

import copy
from pathlib import Path

import pytest
import torch
from known_timm import create
from torch import fx, nn
from torch.ao import quantization
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmcastling import castle, set_mask, switch_to_deploy
from mmcastling.attention import TokenConv, masked_softmax_attention
from mmcastling.deploy import set_precision
from mmcastling.models import CastlingLeViT, CastlingMViT, CastlingViT

LAYERS = (nn.Linear, nn.Conv2d)
LIMITS = Path(__file__).parents[1] / "docs" / "limits.md"


def timm_vit():
    # 16x16 tokens: more than landmarks, of which a traced graph takes 8x8 anywhere.
    options = dict(img_size=64, patch_size=4, embed_dim=24, depth=2, num_heads=3)
    options.update(init_values=0.5)
    return castle(create("vision_transformer.VisionTransformer", **options))


def own_vit():
    arch = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48)
    return CastlingViT(
        arch, img_size=64, out_type="raw", ffn_conv=5, layer_scale_init_value=0.5
    )


def own_levit():
    arch = dict(embed_dims=[32, 48], key_dims=[8, 8], num_heads=[2, 3], depths=[1, 1])
    return CastlingLeViT(arch, ffn_conv=3)


def own_mvit():
    arch = dict(embed_dims=16, num_layers=2, num_heads=1, downscale_indices=[1])
    return CastlingMViT(arch, img_size=64, ffn_conv=3)


MODELS = {"timm": timm_vit, "vit": own_vit, "levit": own_levit, "mvit": own_mvit}


@pytest.fixture(
    scope="module", params=["timm", *(f"{name} deployed" for name in MODELS)]
)
def model(request):
    name, _, deployed = request.param.partition(" ")
    torch.manual_seed(0)
    network = MODELS[name]()
    set_mask(network, 1.0)
    network.train(False)
    return switch_to_deploy(network) if deployed else network


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def output(model):
    y = model(images())
    return y[0] if isinstance(y, tuple) else y


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LAYERS)]


# -- whatever looks --------------------------------------------------------------------


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def is_fused(name):
    return "mkldnn" in name or "onednn" in name or "mmcastling" in name


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_only_what_nobody_looks_at_is_fused(model):
    with profile() as calls:
        expected = output(model)
    assert any("_linear_pointwise" in e.name for e in calls.function_events)
    with Names() as seen:
        assert_close(output(model), expected, atol=1e-5, rtol=1e-4)
    assert not any(is_fused(name) for name in seen.names)
    kinds = {type(layer) for layer in layers_of(model)}
    assert kinds <= {nn.Linear, nn.Conv2d, TokenConv}


def by_torch(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2


def by_analyser(kind, model, x):
    analyser = kind(model, x)
    analyser.unsupported_ops_warnings(False)
    counts = analyser.by_operator()  # norms are counted, too
    products = ("conv", "linear", "matmul", "bmm", "einsum", "addmm")
    return sum(counts[name] for name in products if name in counts)


def by_mmengine(model, x):
    from mmengine.analysis import FlopAnalyzer

    return by_analyser(FlopAnalyzer, model, x)


def by_fvcore(model, x):
    fvcore = pytest.importorskip("fvcore.nn", reason="pip install fvcore")
    return by_analyser(fvcore.FlopCountAnalysis, model, x)


def by_hooks(model, x):
    macs, handles = [], []

    def count(layer, inputs, out):
        if isinstance(layer, nn.Linear):
            macs.append(out.numel() * layer.in_features)
        else:
            macs.append(len(out) * out.shape[2:].numel() * layer.weight.numel())

    for layer in layers_of(model):
        handles.append(layer.register_forward_hook(count))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    for handle in handles:
        handle.remove()
    counts = counter.get_flop_counts()["Global"]
    # The sums over tokens are nobody's layer.
    return sum(macs) + sum(n for op, n in counts.items() if "bmm" in str(op)) / 2


COUNTERS = {
    "torch.utils.flop_counter": by_torch,
    "mmengine.analysis": by_mmengine,
    "fvcore": by_fvcore,
    "forward hooks": by_hooks,
}


@pytest.mark.parametrize("tool", COUNTERS)
def test_counters_agree(tool, model):
    assert COUNTERS[tool](model, images()) == by_torch(model, images())


@pytest.mark.parametrize("deploy", [False, True], ids=["castled", "deployed"])
@pytest.mark.parametrize("tool", COUNTERS)
def test_counters_give_the_published_cost(tool, deploy):
    network = CastlingViT("tiny", ffn_conv=5)
    set_mask(network, 1.0)
    network.train(False)
    if deploy:
        switch_to_deploy(network, inplace=True)
    macs = COUNTERS[tool](network, torch.randn(1, 3, 224, 224)) + 192 * 1000  # head
    assert macs == pytest.approx(1.18e9, rel=0.005)


def test_torch_counts_the_auxiliary_branch_as_dense_attention():
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind()
    q.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        masked_softmax_attention(q, k, v).sum().backward()
    product = 2 * 2 * 9 * 9 * 4
    assert counter.get_total_flops() == (2 + 5) * product


def test_torch_counts_8_bit_layers():
    network = switch_to_deploy(own_vit()).eval().requires_grad_(False)
    before = by_torch(network, images())
    set_precision(network, "int8")
    assert by_torch(network, images()) == before


# -- whatever changes ------------------------------------------------------------------


def by_fx(model):
    if not hasattr(model, "blocks") or not hasattr(model, "global_pool"):
        pytest.skip("the originals of mmpretrain ask for sizes, and are not traced")
    return fx.symbolic_trace(model)


def by_make_fx(model):
    with torch.no_grad():
        graph = make_fx(lambda x: model(x))(images())
    assert not any(is_fused(str(node.target)) for node in graph.graph.nodes)
    return graph


def by_observers(model):
    model.qconfig = quantization.get_default_qconfig("onednn")
    observed = quantization.prepare(model)
    output(observed)
    seen = [m for m in observed.modules() if isinstance(m, quantization.ObserverBase)]
    assert len(seen) >= sum(isinstance(m, nn.Linear) for m in model.modules())
    activations = [m for m in seen if isinstance(m, quantization.HistogramObserver)]
    assert all(m.min_val.isfinite().all() for m in activations)
    return observed


TRACERS = {
    "torch.fx": by_fx,
    "make_fx": by_make_fx,
    "torch.ao.quantization.prepare": by_observers,
}


@pytest.mark.parametrize("tool", TRACERS)
def test_what_is_traced_or_watched_gives_the_same(tool, model):
    expected = output(model)
    traced = TRACERS[tool](copy.deepcopy(model))
    assert_close(output(traced), expected, atol=1e-5, rtol=1e-4)


class Scaled(nn.Module):
    def forward(self, weight):
        return 1.3 * weight


def by_lora(model):
    peft = pytest.importorskip("peft", reason="pip install peft")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval(), lambda m: m.merge_and_unload()


def by_parametrizations(model):
    for layer in layers_of(model):
        parametrize.register_parametrization(layer, "weight", Scaled())

    def finish(model):
        for layer in layers_of(model):
            parametrize.remove_parametrizations(layer, "weight")
        return model

    return model, finish


def by_pruning(model):
    for layer in layers_of(model):
        prune.l1_unstructured(layer, "weight", 0.5)

    def finish(model):
        for layer in layers_of(model):
            prune.remove(layer, "weight")
        return model

    return model, finish


CHANGES = {
    "peft": by_lora,
    "torch.nn.utils.parametrize": by_parametrizations,
    "torch.nn.utils.prune": by_pruning,
}


@pytest.mark.parametrize("tool", CHANGES)
def test_changed_weights_act_as_if_they_were_permanent(tool, model):
    before = output(model)
    changed, finish = CHANGES[tool](copy.deepcopy(model))
    y = output(changed)
    assert (y - before).abs().max() > 0.01
    assert_close(output(finish(changed)), y, atol=1e-4, rtol=1e-4)


def by_torch_ao(model):
    quantized = quantization.quantize_dynamic(model)
    found = (m for m in quantized.modules())
    return quantized, sum(
        type(m) is torch.ao.nn.quantized.dynamic.Linear for m in found
    )


def by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    linear = (m for m in model.modules() if isinstance(m, nn.Linear))
    return model, sum(type(m.weight) is not nn.Parameter for m in linear)


QUANTIZERS = {"quantize_dynamic": by_torch_ao, "torchao": by_torchao}


@pytest.mark.parametrize("tool", QUANTIZERS)
def test_quantizers_find_every_linear_layer(tool, model):
    expected = output(model)
    quantized, found = QUANTIZERS[tool](copy.deepcopy(model))
    assert found == sum(isinstance(m, nn.Linear) for m in model.modules()) > 0
    error = (output(quantized) - expected).abs().max() / expected.abs().max()
    assert 1e-6 < error < 0.2


@pytest.mark.parametrize("tool", [*COUNTERS, *TRACERS, *CHANGES, *QUANTIZERS])
def test_the_table_in_the_docs_has_every_tool(tool):
    text = LIMITS.read_text().partition("## Other tools")[2].partition("\n## ")[0]
    assert tool in text
