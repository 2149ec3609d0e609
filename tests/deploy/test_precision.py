"""Lower precision: which layers compute in it, what stays float32, what is refused."""

import collections
import copy
import io
import re

import pytest
import torch
from known_models import MODELS, build, output
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from mmcastling import castle, switch_to_deploy
from mmcastling.attention.fast import apply_then
from mmcastling.castle.swap import NothingToCastle
from mmcastling.deploy import precision as module
from mmcastling.deploy import set_precision, tensors_in
from mmcastling.deploy.int8 import QuantizedLinear
from mmcastling.models import CastlingLeViT, CastlingMViT, CastlingViT
from mmcastling.run import ConfigError, convert, evaluate, load_config

FAMILIES = {
    "vit": lambda **options: CastlingViT(
        "nano", img_size=64, patch_size=8, out_type="featmap", **options
    ),
    "levit": lambda **options: CastlingLeViT(
        dict(embed_dims=[32, 48], key_dims=[8, 8], num_heads=[2, 3], depths=[2, 1]),
        out_indices=(0, 1),
        **options,
    ),
    "mvit": lambda **options: CastlingMViT(
        dict(embed_dims=16, num_layers=4, num_heads=1, downscale_indices=[1, 2]),
        img_size=64,
        out_indices=(0, 1, 2),
        **options,
    ),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def any_machine(monkeypatch):
    """A machine that has instructions for everything; emulation is right, and slow."""
    monkeypatch.setattr(module, "computes_in", lambda dtype, device: True)


def deployed(family, **options):
    torch.manual_seed(0)
    return FAMILIES[family](deploy=True, **options).eval().requires_grad_(False)


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_lowered_and_norms_are_not(any_machine, family, precision):
    model = deployed(family, ffn_conv=3)
    expected = model(images(64, 96))
    set_precision(model, precision)
    found = model(images(64, 96))
    layers = {m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert {layer.weight.dtype for layer in layers} == {DTYPES[precision]}
    held = {name for layer in layers for name, _ in layer.named_parameters()}
    assert held <= {"weight", "bias"}
    others = [m for m in model.modules() if m not in layers]
    rest = {p.dtype for m in others for p in m.parameters(recurse=False)}
    assert rest == {torch.float32}  # norms and position embeddings
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        error = (a - b).abs().max() / b.abs().max()
        assert 1e-6 < error < (0.05 if precision == "bf16" else 0.01)


def test_attention_normalises_in_float32(any_machine, monkeypatch):
    """Rounded after its projections, attention is exact up to rounding its output."""
    model = deployed("vit")
    attention = model.layers[0].attn
    set_precision(model, "bf16")
    seen = {}
    hook = attention.qkv.register_forward_hook(
        lambda m, inputs, out: seen.update(qkv=out)
    )
    attention.proj.register_forward_pre_hook(
        lambda m, inputs: seen.update(mixed=inputs[0]), prepend=True
    )
    attention(torch.randn(1, 64, 128), (8, 8))
    hook.remove()
    exact = deployed("vit").layers[0].attn.double()
    exact.mixer.local_conv.weight.data = attention.mixer.local_conv.weight.double()
    q, k, v = seen["qkv"].double().reshape(1, 64, 3, 4, 32).permute(2, 0, 3, 1, 4)
    y = exact.mixer(q, k, v)
    y = y.transpose(1, 2).flatten(2)
    assert_close(seen["mixed"].double(), y, rtol=2**-8, atol=2**-8)


def test_float32_changes_nothing():
    model = deployed("vit")
    expected = model(images(64, 64))
    set_precision(model, "fp32")
    assert_close(model(images(64, 64)), expected, rtol=0, atol=0)
    set_precision(model, "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_with_its_branch_is_refused(any_machine, precision):
    with pytest.raises(ValueError, match="still has its auxiliary branch: prune it"):
        set_precision(FAMILIES["vit"](), precision)


def test_a_lowered_model_is_refused(any_machine):
    model = deployed("vit")
    set_precision(model, "bf16")
    with pytest.raises(ValueError, match=r"layers compute in bf16 already"):
        set_precision(model, "fp16")


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_quantizes_the_backbones_linear_layers(family):
    model = deployed(family, ffn_conv=3)
    expected = [model(images(*size)) for size in ((64, 64), (96, 64))]
    linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    set_precision(model, "int8")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == linear > 0
    assert not any(isinstance(m, nn.Linear) for m in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # norms, positions
    found = [model(images(*size)) for size in ((64, 64), (96, 64))]
    for a, b in zip(sum(found, ()), sum(expected, ()), strict=True):
        assert a.dtype == torch.float32
        assert 1e-6 < (a - b).abs().max() / b.abs().max() < 0.15
    with pytest.raises(ValueError, match="compute in int8 already"):
        set_precision(model, "int8")


@pytest.mark.parametrize("gains", [True, False])
def test_int8_computes_neck_and_heads_in_bf16_where_that_gains(
    any_machine, monkeypatch, gains
):
    monkeypatch.setattr(module, "gains_nothing", lambda *_: None if gains else "no")
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.Linear(16, 16))
    model.head = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Linear(16, 4))
    model.forward = lambda x: model.head(model.backbone(x))
    model.requires_grad_(False)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    set_precision(model, "int8")
    found = model(x)
    assert isinstance(model.backbone[2], QuantizedLinear)
    assert model.backbone[0].weight.dtype == torch.float32
    wanted = torch.bfloat16 if gains else torch.float32
    assert model.head[1].weight.dtype == wanted
    assert found.dtype == torch.float32
    assert 1e-6 < (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("bias", [True, False])
def test_a_quantized_layer_is_off_by_the_rounding_of_input_and_weight(bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    with torch.no_grad():
        linear.weight[3] *= 100.0  # which a scale per layer would let swamp the rest
        linear.weight[5] = 0.0
    x = 3.0 * torch.randn(2, 7, 96)
    layer = QuantizedLinear(linear)
    step_x = (x.max() - x.min()) / layer.input_levels
    step_w = linear.weight.abs().amax(1) / 127
    bound = 96 * (step_x / 2 * linear.weight.abs().amax(1) + step_w / 2 * x.abs().max())
    error = (layer(x) - linear(x)).abs().amax((0, 1))
    assert (error <= 1.1 * bound + 1e-5).all() and error[3] > 0
    assert_close(layer(x)[..., 5], linear(x)[..., 5])


def test_rows_are_rounded_alike_in_whatever_number():
    """More than are rounded at a time, and in any layout in memory."""
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(24, 16).requires_grad_(False))
    x = torch.randn(3, 24, 150).transpose(1, 2)  # 450 rows, channels apart in memory
    x[0, 0, 0], x[0, 1, 0] = 9.0, -9.0  # one step for whatever holds the first image
    assert torch.equal(layer(x)[0], layer(x[:1].contiguous())[0])


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Hardswish()], ids=str
)
def test_a_quantized_layer_applies_the_activation_behind_it(activation):
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(32, 48).requires_grad_(False))
    x = torch.randn(5, 32)
    expected = activation(layer(x))
    assert_close(apply_then(layer, activation, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_the_only_one(value):
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(32, 48).requires_grad_(False))
    x = torch.randn(2, 3, 32)
    x[1, 0] = 0.0
    expected = apply_then(layer, nn.GELU(), x)
    x[1, 0, 5] = value
    found = apply_then(layer, nn.GELU(), x)
    assert found[1, 0].isnan().all()
    found[1, 0], expected[1, 0] = 0.0, 0.0
    assert torch.equal(found, expected)


def test_a_convolution_stays_between_a_quantized_layer_and_its_gelu():
    model = deployed("vit", ffn_conv=3)
    for name, parameter in model.named_parameters():
        if "dwconv" in name:
            nn.init.normal_(parameter, std=0.2)
    (expected,) = model(images(64, 96))
    early = copy.deepcopy(model)
    for block in early.layers:
        gelu = block.ffn.layers[0][1]
        block.ffn.layers[0][0].register_forward_hook(lambda _, x, y, gelu=gelu: gelu(y))
        block.ffn.layers[0][1] = nn.Identity()
    apart = (early(images(64, 96))[0] - expected).abs().max()
    set_precision(model, "int8")
    (found,) = model(images(64, 96))
    assert (found - expected).abs().max() < 0.3 * apart


def test_deploying_again_leaves_a_lowered_model_as_it_is():
    for family in FAMILIES:
        model = deployed(family)
        set_precision(model, "int8")
        expected = model(images(64, 64))
        model.switch_to_deploy()
        assert_close(model(images(64, 64)), expected, atol=0, rtol=0)


def test_large_inputs_do_not_overflow_the_sums():
    """All at the largest level, where pairs of 8-bit products pass 16 bits."""
    linear = nn.Linear(64, 8, bias=False).requires_grad_(False)
    nn.init.ones_(linear.weight)
    found = QuantizedLinear(linear)(torch.ones(5, 64))
    assert_close(found, torch.full((5, 8), 64.0), rtol=0.02, atol=0)


def test_int8_without_operators_is_refused(monkeypatch):
    monkeypatch.setattr(module, "has_int8", lambda: False)
    with pytest.raises(RuntimeError, match=r"int8 is for CPUs.* choose fp32"):
        set_precision(deployed("vit"), "int8")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision 'fp8' is not known: choose one of"):
        set_precision(deployed("vit"), "fp8")


def test_a_machine_without_it_is_named_with_what_it_has(monkeypatch):
    has = {torch.bfloat16: True, torch.float16: False}
    monkeypatch.setattr(module, "computes_in", lambda dtype, device: has[dtype])
    message = r"fp16: this cpu has no instructions for torch.float16.*'fp32', 'bf16'\]"
    with pytest.raises(RuntimeError, match=message):
        set_precision(deployed("vit"), "fp16")


# -- models of others, copies and files ------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.long
def test_whatever_castle_knows_is_lowered_copied_saved_and_loaded(any_machine, name):
    if name == "timm-convit":
        pytest.skip("its gated attention mixes precisions by itself: docs/limits.md")
    for part, precisions in (({}, BOUNDS), (dict(stages=[-1]), ["bf16"])):
        model = build(name)
        model.eval()
        try:
            castle(model, mask_threshold=1.0, **part)
        except NothingToCastle:  # in that stage
            assert part
            continue
        model = switch_to_deploy(model).requires_grad_(False)
        x = images(*MODELS[name][1][0])
        expected = output(model, x)
        for precision in precisions:
            lowered, other = copy.deepcopy(model), copy.deepcopy(model)
            for parameter in other.parameters():
                nn.init.zeros_(parameter)
            for each in (lowered, other):
                set_precision(each, precision)
            found = output(lowered, x)
            assert found.dtype == torch.float32
            error = (found - expected).abs().max() / expected.abs().max()
            assert 0 < error < BOUNDS[precision]
            assert torch.equal(output(copy.deepcopy(lowered), x), found)
            if "<locals>" not in type(model).__qualname__:
                whole = through_a_file(lowered, weights_only=False)
                assert torch.equal(output(whole, x), found)
            for weights in (lowered.state_dict(), model.state_dict()):
                # mmpretrain's SwinV2 drops buffers of its own as it loads.
                strict = name != "swin2"
                other.load_state_dict(through_a_file(weights), strict=strict)
                assert torch.equal(output(other, x), found)


BOUNDS = {"bf16": 0.1, "fp16": 0.02, "int8": 0.3}


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


Pair = collections.namedtuple("Pair", "first second")


class KeywordNet(nn.Module):
    """A call by keyword, an output of named parts, and a layer of another kind."""

    class Cosine(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.normalize(x, dim=-1))

    def __init__(self):
        super().__init__()
        self.linear, self.cosine = nn.Linear(8, 8), self.Cosine(8, 8)

    def forward(self, x):
        return Pair(self.linear(input=x), dict(y=self.cosine(x)))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_keywords_named_tuples_hooks_and_other_layers(any_machine, precision, caplog):
    torch.manual_seed(0)
    model, x = KeywordNet().requires_grad_(False), torch.randn(4, 8)
    expected, calls = model(x), []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    set_precision(model, precision)
    found = model(x)
    assert type(found) is Pair and calls == [1]
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, rtol=0.05, atol=0.05)
    assert ("1 of 2 layers stay float32" in caplog.text) == (precision == "int8")
    assert ("cosine" in caplog.text) == (precision == "int8")


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
    ],
    ids=["pruned", "spectral", "weight"],
)
def test_computed_weights_are_lowered_or_stay(any_machine, wrap, precision, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    wrap(model[0])
    model.requires_grad_(False).eval()
    x = torch.randn(4, 16)
    expected = model(x)
    set_precision(model, precision)
    assert 0 < (model(x) - expected).abs().max() < 0.05 * expected.abs().max()
    assert isinstance(model[1], QuantizedLinear) == (precision == "int8")
    assert ("1 of 2 layers stay" in caplog.text) == (precision == "int8")


def test_a_bare_layer_and_one_used_twice_are_quantized():
    layer = nn.Linear(8, 8).requires_grad_(False)
    model = nn.ModuleDict(dict(a=layer, b=nn.Sequential(layer)))
    set_precision(model, "int8")
    assert model["a"] is model["b"][0] and isinstance(model["a"], QuantizedLinear)
    bare = nn.Linear(8, 8).requires_grad_(False)
    set_precision(bare, "int8")
    assert isinstance(bare, QuantizedLinear) and bare(torch.randn(2, 8)).shape == (2, 8)


# -- through the commands --------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_detector_is_evaluated_in_it(any_machine, precision, trained, tmp_path):
    cfg = load_config(trained.config, work_dir=str(tmp_path))
    result = evaluate(cfg, trained.masks_off, precision=precision)
    assert result.precision == precision
    expected = evaluate(cfg, trained.masks_off)
    assert expected.precision == "fp32"
    assert result.metrics == pytest.approx(expected.metrics, abs=0.05)


def test_evaluation_with_the_branch_is_refused(any_machine, trained, tmp_path):
    cfg = load_config(trained.config, work_dir=str(tmp_path))
    with pytest.raises(ValueError, match="leave --no-deploy out"):
        evaluate(cfg, trained.masks_off, deploy=False, precision="bf16")


def test_the_converter_writes_it_into_the_config(
    any_machine, trained, tmp_path, capsys
):
    out = tmp_path / "deployed.pth"
    cfg = load_config(trained.config)
    report = convert(cfg, trained.masks_off, out, precision="bf16")
    said = capsys.readouterr().out
    assert 0 < float(re.search(r"bf16 changes them by up to ([\d.]+)%", said)[1]) < 5
    assert report.difference < 1e-4  # of pruning, in float32
    deployed_cfg = load_config(out.with_suffix(".py"), work_dir=str(tmp_path))
    assert evaluate(deployed_cfg, out).precision == "bf16"
    assert evaluate(deployed_cfg, out, precision="fp32").precision == "fp32"
    with pytest.raises(ConfigError, match=r"end the name in \.pth"):
        convert(cfg, trained.masks_off, tmp_path / "x.bin", precision="bf16")


def test_no_images_give_no_features(any_machine):
    model = deployed("vit")
    (expected,) = model(torch.zeros(0, 3, 64, 64))
    set_precision(model, "int8")
    (found,) = model(torch.zeros(0, 3, 64, 64))
    assert found.shape == expected.shape == (0, 128, 8, 8)
