"""What castling does to models of transformers, and of libraries built on it."""

import copy
import io

import pytest
import torch
from known_transformers import TRANSFORMERS, transformers_model
from torch import nn
from torch.testing import assert_close

from mmcastling import castle, set_mask, switch_to_deploy
from mmcastling.castle import castled_from_pretrained
from mmcastling.errors import CheckpointError

SAVED = [name for name in TRANSFORMERS if name.startswith("hf-")]
REASON = "transformers is not installed: pip install -r requirements-dev.txt"
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def build(name):
    torch.manual_seed(0)
    return TRANSFORMERS[name][0]()


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_as_softmax_attention_a_model_computes_what_it_did_with_its_biases(name):
    model, sizes = build(name), TRANSFORMERS[name][1]
    inputs = [torch.randn(2, 3, *size) for size in sizes]
    expected = [model(x) for x in inputs]
    castle(model, type="softmax")
    for x, y in zip(inputs, expected, strict=True):
        assert_close(model(x), y, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("hf-vit", "hf-beit") else pytest.param(n, marks=pytest.mark.long)
        for n in SAVED
    ],
)
@torch.no_grad()
def test_what_save_pretrained_wrote_is_loaded(name, tmp_path):
    model = castle(build(name), mask_threshold=1.0)
    for weight in model.parameters():
        weight += 0.01 * torch.randn_like(weight)
    model.model.save_pretrained(tmp_path)
    expected = model(IMAGE)
    for options in (dict(mask_threshold=1.0), dict(deploy=True)):
        kind = type(model.model)
        model.model = castled_from_pretrained(kind, tmp_path, **options)
        assert type(model.model) is kind
        assert_close(model(IMAGE), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("castled", [False, True])
def test_a_folder_without_what_castling_added_is_refused(castled, tmp_path):
    model = build("hf-vit")
    if castled:
        castle(model, form="released", center_keys=False)
    model.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks .*mixer\.even.* and castle it"):
        castled_from_pretrained(type(model.model), tmp_path, deploy=True)


@pytest.mark.parametrize("name", ["hf-vit", "hf-beit"])
def test_copies_pickles_and_graphs_of_a_castled_model_compute_the_same(name):
    model = castle(build(name), mask_threshold="1/N")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = model(IMAGE)
    for other in (
        copy.deepcopy(model),
        torch.load(file, weights_only=False),
        torch.compile(model, backend="eager"),
        torch.export.export(model, (IMAGE,)).module(),
    ):
        assert_close(other(IMAGE), expected)
    own = {id(module) for module in model.modules()}
    assert not any(id(module) in own for module in copy.deepcopy(model).modules())


def test_an_attention_that_was_kept_stays_softmax_and_gives_its_weights():
    model = transformers_model("ViTModel", "ViTConfig")
    castle(model, keep=[-1])
    assert model(IMAGE, output_attentions=True).attentions == ()
    model.set_attn_implementation("eager")
    (weights,) = model(IMAGE, output_attentions=True).attentions
    assert_close(weights.sum(-1), torch.ones(2, 3, 17))


def test_a_mask_is_refused():
    model = castle(transformers_model("ViTModel", "ViTConfig"))
    mask = torch.ones(2, 17)
    model(IMAGE, attention_mask=mask)  # which masks nothing
    mask[:, -1] = 0
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(IMAGE, attention_mask=mask)
    beit = castle(transformers_model("BeitModel", "BeitConfig"))
    with pytest.raises(ValueError, match="takes no attention_mask"):
        beit(IMAGE, attention_mask=mask)
    sam = castle(build("hf-sam")).model
    with pytest.raises(ValueError, match="no weights to give back"):
        sam.vision_encoder.layers[0].attn(
            torch.zeros(1, 3, 3, 24), output_attentions=True
        )


def test_our_name_in_the_interface_is_for_castled_attentions():
    model = transformers_model("ViTModel", "ViTConfig")
    castle(copy.deepcopy(model))
    model.set_attn_implementation("mmcastling")
    with pytest.raises(ValueError, match="leave it out and castle the model"):
        model(IMAGE)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("BertModel", "BertConfig", "no attention over an image's patches"),
        ("LlamaModel", "LlamaConfig", "it is causal"),
    ],
)
def test_what_does_not_attend_from_patches_to_themselves_is_refused(
    kind, config, reason
):
    transformers = pytest.importorskip("transformers", reason=REASON)
    sizes = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=1)
    options = dict(sizes, vocab_size=32, intermediate_size=24)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    with pytest.raises(ValueError, match=reason):
        castle(model)


def test_attentions_on_reduced_keys_are_left_alone():
    transformers = pytest.importorskip("transformers", reason=REASON)
    config = transformers.SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4)
    model = transformers.SegformerModel(config)
    _, report = castle(model, return_report=True)
    assert len(report.castled) == 1
    reasons = [r for r in report.left_alone.values() if "spatially reduced" in r]
    assert len(reasons) == 3


def test_the_text_tower_of_clip_is_left_alone():
    transformers = pytest.importorskip("transformers", reason=REASON)
    part = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=1)
    config = transformers.CLIPConfig(
        text_config=dict(part, vocab_size=32, intermediate_size=24),
        vision_config=dict(part, image_size=64, patch_size=16, intermediate_size=24),
    )
    _, report = castle(transformers.CLIPModel(config), return_report=True)
    assert [item.name for item in report.castled] == [
        "vision_model.encoder.layers.0.self_attn"
    ]
    (name,) = report.left_alone
    assert name.startswith("text_model")


def test_cross_attention_of_sams_decoder_is_left_alone():
    transformers = pytest.importorskip("transformers", reason=REASON)
    small = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=1)
    config = transformers.SamConfig(
        vision_config=dict(small, image_size=64, output_channels=24, mlp_dim=24),
        prompt_encoder_config=dict(hidden_size=24, image_size=64),
        mask_decoder_config=dict(small, mlp_dim=24),
    )
    _, report = castle(transformers.SamModel(config), return_report=True)
    assert [i.was for i in report.castled] == ["SamVisionSdpaAttention"]
    reasons = [r for r in report.left_alone.values() if "keys of other tokens" in r]
    assert len(reasons) == 4


def test_tokens_behind_the_grid_do_not_enter_a_convolution_on_it():
    model = castle(build("hf-yolos"), type="softmax", local_conv="grid").model
    attention = model.encoder.layer[0].attention.attention
    for layer in (attention.query, attention.key):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.dirac_(attention.mixer.local_conv.weight, groups=24)
    seen = []
    attention.register_forward_hook(lambda *args: seen.append(args))
    model(torch.randn(1, 3, 96, 48), interpolate_pos_encoding=True)
    ((_, (x, *_), (y, *_)),) = seen
    values = attention.value(x)
    own = values.clone()  # each token of the grid has its own value, added to the mean
    own[:, :1], own[:, -5:] = 0, 0
    assert_close(y, own + values.mean(1, keepdim=True))


def test_a_shared_bias_goes_with_the_last_layer_that_takes_it():
    model = castle(build("hf-beit-shared")).model
    assert model.shared_position_bias is None
    model = castle(build("hf-beit-shared"), keep=[0]).model
    assert model.shared_position_bias is not None
    model(IMAGE)


def test_a_bias_of_a_layer_goes_at_deployment():
    model = castle(build("hf-beit"))
    assert "relative_position_bias" in "".join(model.state_dict())
    deployed = switch_to_deploy(model)
    assert "relative_position_bias" not in "".join(deployed.state_dict())
    set_mask(model, 1.0)
    deployed.load_state_dict(model.state_dict())
    assert_close(deployed(IMAGE), model(IMAGE), atol=1e-5, rtol=1e-5)
    model.train()(IMAGE).sum().backward()  # with masks off
    tables = [p for n, p in model.named_parameters() if "relative_position" in n]
    assert tables and all(table.grad is not None for table in tables)


def test_rfdetr_has_no_grid():
    with pytest.raises(ValueError, match="orders tokens by windows"):
        castle(build("rfdetr"), local_conv="grid")
