"""Every adapter on the library's own model: weights, outputs, gradients, deploy."""

import copy
import re

import pytest
import torch
from known_models import (
    BIASES,
    MODELS,
    build,
    images,
    mmpretrain_beit,
    mmpretrain_levit,
    mmpretrain_mvit,
    mmpretrain_swin,
    mmpretrain_vit,
    output,
    torchvision_vit,
)
from known_timm import LONG, SIZES, timm_small, timm_vit
from known_transformers import LONG as LONG_TRANSFORMERS
from torch import nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

from mmcastling import castle, castling_modules, set_mask, switch_to_deploy
from mmcastling.attention import MIXERS
from mmcastling.castle import CastledAttention
from mmcastling.deploy import tensors_in
from mmcastling.export.formats import write


@pytest.fixture(
    params=[
        pytest.param(
            name, marks=[pytest.mark.long] if name in LONG | LONG_TRANSFORMERS else []
        )
        for name in MODELS
    ]
)
def case(request):
    _, sizes, count = MODELS[request.param]
    return build(request.param), sizes, count


@pytest.mark.long
def test_weights_that_keep_a_meaning_are_the_same_parameters(case):
    model, _, count = case
    before = dict(model.named_parameters())
    castled, report = castle(model, return_report=True)
    after = dict(model.named_parameters())
    assert castled is model
    assert len(report.castled) == len(list(castling_modules(model))) == count
    kept = {id(p) for p in after.values()}
    lost = [name for name, p in before.items() if id(p) not in kept]
    assert all(any(bias in name for bias in BIASES) for name in lost), lost
    assert set(lost) <= set(report.dropped)
    had = {id(p) for p in before.values()}
    new = [name for name, p in after.items() if id(p) not in had]
    ours = re.compile(r".*\bmixer\.(own|even|gain|sharpness|local_conv\.weight)")
    forms = [module.form for _, module in castling_modules(model)]
    assert len(new) == 4 * count + forms.count("landmarks")  # which have a sharpness
    assert all(ours.fullmatch(name) for name in new), new


def test_as_softmax_attention_the_model_computes_what_it_did(case):
    model, sizes, _ = case
    model.eval()  # mmpretrain's returns None
    castled, report = castle(copy.deepcopy(model), type="softmax", return_report=True)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in report.dropped:  # what the report says is gone
            if name in weights:
                weights[name].zero_()
    subsamples = any("no longer subsampled" in note for note in report.notes)
    for size in sizes:
        expected, y = output(model, images(size)), output(castled, images(size))
        if subsamples and (y - expected).abs().max() > 1e-4:
            assert y.shape == expected.shape  # see below
            continue
        assert_close(y, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_mvit_without_subsampled_keys_computes_what_it_did(size):
    torch.manual_seed(0)
    model = mmpretrain_mvit(rel_pos_spatial=False, adaptive_kv_stride=1)
    model.eval()
    expected = output(model, images(size))
    castle(model, type="softmax")
    assert_close(output(model, images(size)), expected, atol=1e-5, rtol=0)


@pytest.mark.long
def test_the_castled_model_trains_at_every_size(case):
    model, sizes, _ = case
    before = dict(model.named_parameters())
    model.train()
    castle(model, mask_threshold=0.0)
    assert all(module.training for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in sizes:
        optimizer.zero_grad()
        y = output(model, images(size))
        (y * torch.randn_like(y)).mean().backward()
        optimizer.step()
        for name, module in castling_modules(model):
            assert module.branch.density.item() == pytest.approx(1.0), name
    for name, weight in model.named_parameters():
        if weight.requires_grad:  # else DistributedDataParallel waits for it
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name
        if name in before:
            assert weight is before[name]


def test_deployed_equals_decayed_and_differs_from_undecayed(case):
    model, sizes, _ = case
    model.eval()
    castle(model, mask_threshold=0.0)
    for size in sizes:
        set_mask(model, 0.0)
        x = images(size)
        trained = output(model, x)
        deployed = switch_to_deploy(model)
        assert list(castling_modules(deployed)) == []
        assert (output(deployed, x) - trained).abs().max() > 1e-4
        set_mask(model, 1.0)
        assert_close(output(deployed, x), output(model, x), atol=1e-4, rtol=1e-4)


def test_checkpoints_of_a_castled_model_load_into_a_deployed_one(case):
    model, sizes, _ = case
    model.eval()
    fresh = copy.deepcopy(model)
    castle(model, mask_threshold=1.0)
    castle(fresh, deploy=True)
    fresh.load_state_dict(model.state_dict())
    x = images(sizes[0])
    assert_close(output(fresh, x), output(model, x), atol=1e-5, rtol=1e-5)
    fresh, again = switch_to_deploy(fresh), switch_to_deploy(model)
    again.load_state_dict(fresh.state_dict())  # and nothing else is in it
    assert again.state_dict().keys() == fresh.state_dict().keys()
    assert_close(output(again, x), output(fresh, x), atol=1e-5, rtol=1e-5)


# One of each kind of attention. Hiera's is none: torch cannot convert the original.
@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        *("timm", "timm-dinov3", "timm-beit", "timm-sam", "timm-swin", "timm-levit"),
        *("timm-mvit", "timm-tiny-vit", "timm-davit", "timm-volo", "timm-crossvit"),
        *("timm-coatnet", "timm-maxvit-tf", "hf-vit", "hf-beit", "hf-sam", "hf-swin"),
        "torchvision",
    ],
)
def test_the_deployed_model_runs_as_onnx(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    model, (_, sizes, _) = build(name), MODELS[name]
    model.eval()
    model = switch_to_deploy(castle(model, mask_threshold=1.0))
    x = images(sizes[0])
    free = ({0: torch.export.Dim.AUTO},)
    options = dict(format="onnx", outputs=["y"], dynamic_shapes=free)
    write(model, tmp_path / "m.onnx", (x,), **options)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    for batch in (x, x[:1]):
        (y,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert_close(torch.from_numpy(y), output(model, batch), atol=1e-4, rtol=1e-4)


def test_features_are_extracted_by_torchvisions_graphs():
    for model, node in (
        (timm_small("vit_tiny_patch16_224"), "blocks.1.attn"),
        (build("timm-relpos"), "blocks.1.attn"),
        (torchvision_vit(), "encoder.layers.encoder_layer_1.self_attention"),
    ):
        model.eval()
        castle(model)
        x, seen = images((64, 64)), []
        found = create_feature_extractor(model, [node])(x)[node]
        attention = model.get_submodule(node)
        attention.register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        model(x)
        for a, b in zip(tensors_in(found), tensors_in(seen[0]), strict=True):
            assert_close(a, b, rtol=0, atol=0)


# -- what is special to one of them ----------------------------------------------------


def test_beit_keeps_biases_of_queries_and_values_and_has_none_for_keys():
    attention = castle(mmpretrain_beit()).layers[0].attn
    nn.init.ones_(attention.q_bias)
    nn.init.constant_(attention.v_bias, 2.0)
    q, k, v = attention.project(torch.zeros(1, 17, 24))
    assert [t.unique().tolist() for t in (q, k, v)] == [[1.0], [0.0], [2.0]]


@pytest.mark.parametrize("conv", ["token", "grid", None])
@pytest.mark.parametrize("kind", ["castling", "performer", "softmax"])
def test_shifted_windows_do_not_leak_across_regions(kind, conv):
    """A token depends on the tokens that the library's own mask lets it see."""
    from mmpretrain.models.utils import ShiftWindowMSA

    torch.manual_seed(0)
    blocks = nn.ModuleList([ShiftWindowMSA(8, 2, window_size=4, shift_size=1)])
    castle(blocks, type=kind, local_conv=conv)
    size = (8, 12)
    index = torch.arange(96).reshape(1, *size, 1).roll((-1, -1), (1, 2))
    index = ShiftWindowMSA.window_partition(index, 4).reshape(-1, 16)
    mask = ShiftWindowMSA.get_attn_mask(size, window_size=4, shift_size=1)
    seen = torch.zeros(96, 96, dtype=torch.bool)
    for window, allowed in zip(index, mask == 0, strict=True):
        seen[window[:, None], window[None]] = allowed
    x = torch.randn(96, 8).double()
    changed = x + torch.diag_embed(torch.ones(96).double()).unsqueeze(-1)  # (96, 96, 8)
    with torch.no_grad():
        y = blocks.double()[0](torch.cat((x[None], changed)), size)
    touched = (y[1:] - y[:1]).abs().amax(-1) > 1e-12  # by changed token, by output
    assert_close(touched, seen)


def test_swin_refuses_maps_smaller_than_a_window():
    model = castle(mmpretrain_swin())
    with pytest.raises(ValueError, match="4x2 tokens is smaller than a window of 4x4"):
        model(images((32, 16)))


@pytest.mark.parametrize("name", ["beit-shared", "timm-relpos-shared"])
def test_a_shared_bias_goes_with_the_last_attention_that_reads_it(name):
    model, table = build(name), "rel_pos"
    castle(model, stages=[0])
    assert any(table in key for key, _ in model.named_parameters())
    output(model, images((64, 64))).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    castle(whole := build(name))
    assert not any(table in key for key in whole.state_dict())


def test_lost_biases_and_dropouts_are_reported():
    _, report = castle(mmpretrain_beit(), type="performer", return_report=True)
    assert "layers.0.attn.relative_position_bias_table" in report.dropped
    _, report = castle(mmpretrain_beit(), return_report=True)
    assert not report.dropped
    assert "auxiliary branch alone" in next(iter(report.notes))
    _, report = castle(mmpretrain_beit(shared=True), return_report=True)
    assert "shared by blocks" in next(iter(report.notes))
    vit = mmpretrain_vit(layer_cfgs=dict(attn_drop_rate=0.1))
    _, report = castle(vit, return_report=True)
    assert "attention dropout of 0.1 is not applied" in report.notes


def test_torch_attention_is_castled_inside_the_vision_transformer_only():
    with pytest.raises(ValueError, match=r"self_attn \(MultiheadAttention\)"):
        castle(nn.TransformerDecoderLayer(8, 2, batch_first=True))


def test_torch_attention_refuses_other_keys_and_masks():
    attention = castle(torchvision_vit()).encoder.layers[0].self_attention
    x = torch.randn(1, 17, 24)
    for options in [(x, x + 1, x + 1), (x, x, x, torch.ones(1, 17) > 0)]:
        names = ("query", "key", "value", "key_padding_mask")
        with pytest.raises(ValueError, match="attends from tokens to themselves"):
            attention(**dict(zip(names, options, strict=False)))


def test_timm_attention_refuses_masks():
    attention = castle(timm_vit()).blocks[0].attn
    with pytest.raises(ValueError, match="takes no attn_mask"):
        attention(torch.randn(1, 17, 24), attn_mask=torch.zeros(17, 17))


@pytest.mark.parametrize("kind", ["focused", "efficient", "performer", "relu_linear"])
def test_levit_takes_peers_although_its_values_are_wider_than_its_keys(kind):
    model = castle(mmpretrain_levit(), type=kind)
    y = output(model, images((64, 64)))
    assert y.shape == output(mmpretrain_levit(), images((64, 64))).shape
    (y * torch.randn_like(y)).mean().backward()
    attentions = [m for m in model.modules() if isinstance(m, CastledAttention)]
    assert len(attentions) == 5
    for attention in attentions:
        assert type(attention.mixer) is MIXERS[kind]
        for name, weight in attention.named_parameters():
            assert weight.grad is not None and weight.grad.isfinite().all(), name
