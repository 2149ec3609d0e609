"""castle() itself: choosing, reporting, refusing, and adapters of one's own."""

import ast
import copy
import functools
import logging
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close
from torchvision.models import VisionTransformer

from mmcastling import (
    castle,
    castling_modules,
    register_adapter,
    set_mask,
    switch_to_deploy,
)
from mmcastling.attention import Attention, TokenConv, TokenMixer
from mmcastling.castle import (
    RECOMMENDED,
    CannotCastle,
    CastledAttention,
    adapter_registry,
)


class ToyAttention(nn.Module):
    """What a user might have: names of its own, nothing of any library."""

    def __init__(self, dims=12, heads=3):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dims, 3 * dims)
        self.to_out = nn.Linear(dims, dims)
        self.bias = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.to_qkv(x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + self.bias
        return self.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class ToyModel(nn.Module):
    def __init__(self, depth=4, attention=ToyAttention):
        super().__init__()
        self.blocks = nn.ModuleList(attention() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(autouse=True)
def adapter(monkeypatch):
    """The adapter that the documentation shows, for the length of a test."""
    monkeypatch.setattr(adapter_registry, "_ADAPTERS", list(adapter_registry._ADAPTERS))

    @register_adapter(ToyAttention)
    def castle_toy_attention(old, build):
        return CastledAttention(
            build,
            num_heads=old.heads,
            head_dims=old.to_out.in_features // old.heads,
            qkv=old.to_qkv,
            proj=old.to_out,
        )


def mixers(model):
    return [name for name, m in model.named_modules() if isinstance(m, TokenMixer)]


def test_an_adapter_of_ten_lines_makes_a_class_known():
    torch.manual_seed(0)
    model, x = ToyModel(), torch.randn(2, 9, 12)
    expected = model(x)
    names = ["blocks.0.proj.weight", "blocks.0.mixer.local_conv.weight"]
    assert set(names) <= set(castle(ToyModel()).state_dict())
    assert_close(castle(model, type="softmax")(x), expected)


def test_a_later_adapter_replaces_an_earlier_one_and_may_decline():
    @register_adapter(ToyAttention)
    def decline(old, build):
        raise CannotCastle("not today")

    with pytest.raises(ValueError, match=r"blocks\.0 \(not today\)"):
        castle(ToyModel())


def test_classes_may_be_named_by_a_path_that_need_not_exist():
    class Sigmoid2(nn.Sigmoid):
        pass

    @register_adapter("a_library_that.nobody_installed.Attention")
    @register_adapter("torch.nn.Sigmoid")
    def castle_sigmoid(old, build):
        return CastledAttention(build, 1, 4, qkv=nn.Linear(4, 12), proj=nn.Identity())

    model = nn.Sequential(Sigmoid2())
    assert mixers(castle(model)) == ["0.mixer"]


def test_an_attention_may_be_castled_inside_some_modules_only():
    adapter_registry._ADAPTERS.pop()

    @register_adapter(ToyAttention, inside=nn.ModuleList)
    def castle_toy_attention(old, build):
        return CastledAttention(build, 3, 4, qkv=old.to_qkv, proj=old.to_out)

    model = nn.ModuleDict(dict(a=ToyModel(1), b=ToyAttention()))
    _, report = castle(model, return_report=True)
    assert [item.name for item in report.castled] == ["a.blocks.0"]
    assert report.left_alone == {"b": "no adapter"}


class ForeignBranch(nn.Module):
    """A castled attention of a user's own: nothing of ours but the verbs."""

    def __init__(self):
        super().__init__()
        self.linear, self.threshold = nn.Linear(12, 12), 0.0

    def forward(self, x):
        return self.linear(x) * (2.0 if self.threshold < 1 else 1.0)

    def set_mask(self, threshold, weight=1.0, penalty=0.0):
        self.threshold = threshold.probability

    def switch_to_deploy(self):
        self.threshold, self.deploy = 1.0, True


def test_the_verbs_find_what_offers_them():
    register_adapter(ToyAttention)(lambda old, build: ForeignBranch())
    model, x = castle(ToyModel(2)), torch.randn(2, 9, 12)
    assert [name for name, _ in castling_modules(model)] == ["blocks.0", "blocks.1"]
    on = model(x)
    assert set_mask(model, 1.0) == 2
    off = model(x)
    assert (on - off).abs().max() > 0.1
    deployed = switch_to_deploy(model)
    assert_close(deployed(x), off)
    assert list(castling_modules(deployed)) == []


@pytest.mark.parametrize("kind", ["castling", "performer", "softmax"])
def test_torch_fx_takes_an_attention_as_one_step(kind):
    model = castle(ToyModel(2), type=kind, local_conv="grid", grid=(3, 3))
    x = torch.randn(2, 9, 12)
    for each in (model, switch_to_deploy(model)):
        traced = copy.deepcopy(fx.symbolic_trace(each))
        assert_close(traced(x), each(x), rtol=0, atol=0)
        calls = {n.target for n in traced.graph.nodes if n.op == "call_module"}
        assert calls == {"blocks.0", "blocks.1"}
    if kind == "castling":
        assert set_mask(fx.symbolic_trace(model), 1.0) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
@pytest.mark.parametrize("deploy", [True, False])
def test_torchscript_is_refused_with_the_reason(deploy):
    with pytest.raises(RuntimeError, match=r"cannot compile.*use torch\.export"):
        torch.jit.script(castle(ToyModel(), deploy=deploy))


def test_subclasses_are_castled_unless_they_override_forward():
    class Renamed(ToyAttention):
        pass

    class Cross(ToyAttention):
        def forward(self, x):
            return -super().forward(x)

    model = nn.ModuleList([Renamed(), Cross()])
    _, report = castle(model, return_report=True)
    assert [item.was for item in report.castled] == ["Renamed"]
    assert "Cross overrides the forward of ToyAttention" in report.left_alone["1"]


def test_modules_that_occur_twice_stay_one():
    shared = ToyAttention()
    model = nn.ModuleDict(dict(first=shared, second=nn.Sequential(shared)))
    castle(model)
    assert model["first"] is model["second"][0]
    assert isinstance(model["first"], CastledAttention)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (dict(stages=[0, -1]), [0, 3]),
        (dict(stages=range(2)), [0, 1]),
        (dict(predicate=lambda name, module: name.endswith("2")), [2]),
        (dict(stages=[1, 2], predicate=lambda name, module: "2" in name), [2]),
        (dict(keep=[0, -1]), [1, 2]),
        (dict(keep=["0.blocks.1"], stages=[0, 1, 2]), [0, 2]),
    ],
    ids=["ends", "first", "predicate", "both", "all but", "all but by name"],
)
def test_a_part_of_the_model_can_be_chosen(options, chosen):
    model = nn.Sequential(ToyModel())  # stages are found behind what wraps the model
    _, report = castle(model, return_report=True, **options)
    assert mixers(model) == [f"0.blocks.{i}.mixer" for i in chosen]
    assert [item.stage for item in report.castled] == chosen
    assert len(report.left_alone) == 4 - len(chosen)
    assert set(report.left_alone.values()) <= {"not selected", "kept"}
    kept = [why for why in report.left_alone.values() if why == "kept"]
    assert len(kept) == len(options.get("keep", ()))
    assert set_mask(model, 1.0) == len(chosen)
    x = torch.randn(2, 9, 12)
    assert_close(switch_to_deploy(model)(x), model(x))


@pytest.mark.parametrize(
    ("given", "form", "threshold", "conv"),
    [
        ({}, "landmarks", "4/N", nn.Conv2d),
        (dict(form="learned"), "learned", "4/N", nn.Conv2d),
        (dict(form="released", center_keys=False), "released", "4/N", nn.Conv2d),
        (dict(local_conv="token", mask_threshold=0.1), "landmarks", "0.1", TokenConv),
        (dict(type="linear_angular"), "landmarks", None, nn.Conv2d),
    ],
)
def test_what_is_not_given_is_the_form_for_trained_weights(
    given, form, threshold, conv
):
    model = castle(ToyModel(2), grid=(3, 3), **given)
    mixer = model.blocks[0].mixer
    assert mixer.form == form and mixer.center_keys is (form == "learned")
    assert isinstance(mixer.local_conv, conv)
    assert mixer.branch is None or str(mixer.branch.threshold) == threshold
    if not given:
        assert not mixer.local_conv.weight.any()  # no effect until it is trained
        assert RECOMMENDED["form"] == form


def test_a_convolution_runs_along_the_line_where_no_grid_is_known():
    mixer = castle(ToyModel(2)).blocks[0].mixer
    assert isinstance(mixer.local_conv, TokenConv)
    assert not mixer.local_conv.weight.any()


def test_other_types_of_attention_take_none_of_its_options():
    mixer = castle(ToyModel(2), type="performer").blocks[0].mixer
    assert mixer.local_conv is None


def test_stages_are_what_names_first_differ_in():
    model = nn.ModuleDict(dict(a=ToyModel(2), b=ToyModel(3)))
    castle(model, stages=[1])
    assert mixers(model) == [f"b.blocks.{i}.mixer" for i in range(3)]


def test_the_report_tells_what_was_kept_dropped_and_new():
    model = ToyModel(2)
    model.other_attention = nn.MultiheadAttention(12, 3)
    _, report = castle(model, return_report=True)
    assert report.dropped == ["blocks.0.bias", "blocks.1.bias"]
    names = ("own", "even", "gain", "local_conv.weight")  # its grid is not known
    assert report.new == [
        f"blocks.{i}.mixer.{name}" for i in range(2) for name in names
    ]
    assert report.num_kept == 8 + 4
    assert report.left_alone == {"other_attention": "no adapter"}
    assert str(report).splitlines() == [
        "castled     blocks.* (x2)                          ToyAttention -> castling",
        "left alone  other_attention                        no adapter",
        "dropped     blocks.*.bias (x2)",
        *(f"new         blocks.*.mixer.{name} (x2)" for name in names),
        "kept        12 weights and buffers",
    ]


def test_the_report_is_logged_as_a_warning_when_something_is_lost(caplog):
    with caplog.at_level(logging.INFO, logger="mmcastling"):
        castle(ToyModel())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "castled ToyModel" in record.message and "dropped" in record.message


def test_an_optimizer_from_before_is_named_and_no_other(caplog):
    models = [ToyModel() for _ in range(4)]
    castle(models[0])
    other = torch.optim.Adam(models[1].parameters())
    castle(models[2])
    parameters = list(models[3].parameters())  # which are no optimizer's
    castle(models[3], type="softmax")
    del parameters
    assert "optimizer" not in caplog.text
    castle(models[1])
    assert "an optimizer built before does not train (Adam)" in caplog.text
    caplog.clear()
    model = ToyModel()
    torch.optim.SGD(model.parameters(), lr=1.0)  # and forgotten
    castle(model)
    assert "optimizer" not in caplog.text
    assert len(other.param_groups) == 1


def test_options_reach_the_mixer():
    model = castle(ToyModel(), mask_threshold="4/N", local_conv=None)
    for _, module in castling_modules(model):
        assert str(module.branch.threshold) == "4/N" and module.local_conv is None


def test_the_mixer_has_the_precision_and_mode_of_the_attention():
    model = castle(ToyModel().double().eval())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert model(torch.randn(1, 5, 12).double()).dtype == torch.float64


def test_a_deployed_form_can_be_built():
    model = castle(ToyModel(), deploy=True)
    assert list(castling_modules(model)) == [] and len(mixers(model)) == 4


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: castle(ToyModel()), {}, "castled already"),
        (lambda: nn.Sequential(Attention(8, 2, type="hydra")), {}, "castled already"),
        (lambda: switch_to_deploy(castle(ToyModel())), {}, "deployed form already"),
        (ToyModel, dict(type="mean"), "'mean' is not known: choose one of.*castling"),
        (ToyModel, dict(window=7), "unexpected keyword argument 'window'"),
        (ToyModel, dict(mask_threshold=2), "2.* is outside"),
        (ToyModel, dict(local_conv="line"), "'line' is not known"),
        (ToyModel, dict(stages=[4]), "4 is not a stage; there are 4"),
        (ToyModel, dict(stages=[]), "select none of the attentions blocks.0"),
        (ToyModel, dict(predicate=lambda *_: False), "select none"),
        (ToyModel, dict(keep=range(4)), "select none of the attentions blocks.0"),
        (ToyModel, dict(keep=[0, 4]), r"keep=\[0, 4\]: 4 is none of the 4 .*blocks.3"),
        (ToyModel, dict(keep=[-5]), "-5 is none of the 4 attentions, numbered 0 to 3"),
        (ToyModel, dict(keep=["block"]), "'block' is none of the 4 attentions"),
        (ToyModel, dict(keep="blocks.1"), r"such as keep=\['blocks.1'\]"),
        (ToyModel, dict(keep=1), r"such as keep=\[1\]"),
        (ToyModel, dict(keep=[0.5]), "0.5 is none of the 4 attentions"),
        (ToyModel, dict(keep=[True]), "True is none of the 4 attentions"),
        (ToyModel, dict(stages=[True]), "True is not a stage"),
        (ToyModel, dict(stages=[0.0]), "0.0 is not a stage"),
        (ToyAttention, {}, "castle the module that holds it"),
        (
            lambda: nn.ModuleList([nn.MultiheadAttention(8, 2)]),
            {},
            r"resemble one: 0 \(MultiheadAttention\)",
        ),
        (lambda: nn.Linear(2, 2), {}, "knows no attention in Linear.*: none"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(make, options, message):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        castle(model, **options)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_no_library_is_imported():
    folder = Path(adapter_registry.__file__).parent
    roots = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(node.module.split(".")[0])
    assert not roots & {"mmpretrain", "mmdet", "mmseg", "mmcv", "timm", "torchvision"}


# -- hooks -----------------------------------------------------------------------------


def with_hooks(model, find):
    """Hooks of all kinds on each attention, and what they have seen."""
    seen, handles = [], []
    for module in model.modules():
        if find(module):
            handles += [
                module.register_forward_hook(lambda m, x, y: seen.append(type(m))),
                module.register_forward_pre_hook(
                    lambda m, x, k: seen.append(type(m)), with_kwargs=True
                ),
                module.register_full_backward_hook(
                    lambda m, i, o: seen.append(type(m))
                ),
                module.register_load_state_dict_post_hook(
                    lambda m, keys: seen.append(type(m))
                ),
                module.register_state_dict_pre_hook(lambda m, *_: seen.append(type(m))),
            ]
    return seen, handles


def small_vit():
    return VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3)  # torchvision's


def test_hooks_act_on_what_takes_an_attentions_place():
    model = small_vit()
    seen, handles = with_hooks(model, lambda m: isinstance(m, nn.MultiheadAttention))
    castle(model)
    seen.clear()  # of what castle itself asked for
    images = torch.randn(1, 3, 32, 32)
    model(images).sum().backward()
    model.load_state_dict(model.state_dict())
    assert len(seen) == 10 and {kind.__name__ for kind in seen} == {
        "CastledSelfAttention"
    }
    for handle in handles:
        handle.remove()
    seen.clear()
    model(images).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == []


def test_a_forward_that_was_replaced_is_left_alone():
    model = small_vit()
    attention = model.encoder.layers[0].self_attention
    attention.forward = functools.partial(attention.forward)
    _, report = castle(model, return_report=True)
    assert model.encoder.layers[0].self_attention is attention
    (why,) = report.left_alone.values()
    assert "its forward has been replaced" in why and len(report.castled) == 1


def test_hooks_inside_an_attention_are_kept_or_named():
    from mmpretrain.models.backbones import SwinTransformer

    sizes = dict(embed_dims=8, depths=[2], num_heads=[2])
    model = SwinTransformer(sizes, img_size=32, window_size=4, out_indices=(0,))
    hooked = ("ShiftWindowMSA", "WindowMSA", "Softmax")
    seen, _ = with_hooks(model, lambda m: type(m).__name__ in hooked)
    model.stages[0].blocks[0].attn.w_msa.qkv.register_forward_hook(
        lambda m, x, y: seen.append(type(m))
    )
    _, report = castle(model, return_report=True)
    seen.clear()
    model(torch.randn(1, 3, 32, 32))
    gone = [f"hooks on {name} are gone with it" for name in ("w_msa", "w_msa.softmax")]
    assert [note for note in report.notes if "hooks" in note] == gone and report.lossy
    assert [kind.__name__ for kind in seen] == [
        *("CastledShiftWindowMSA", "Linear", "CastledShiftWindowMSA"),
        *["CastledShiftWindowMSA"] * 2,
    ]


def pruned(attention):
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)


def parametrized(attention):
    parametrize.register_parametrization(attention, "in_proj_weight", nn.Tanh())


@pytest.mark.parametrize("compute", [pruned, parametrized])
def test_weights_that_are_computed_are_not_taken_for_parameters(compute):
    model = small_vit()
    compute(model.encoder.layers[0].self_attention)
    model.eval()
    _, report = castle(model, return_report=True)
    assert [item.name for item in report.castled] == [
        "encoder.layers.encoder_layer_1.self_attention"
    ]
    (why,) = report.left_alone.values()
    assert "make that permanent first" in why
    model(torch.randn(1, 3, 32, 32))
