"""--precision auto: what is measured, what is chosen, and what is remembered."""

import copy
import json

import pytest
import torch

from mmcastling.deploy import (
    PrecisionChoice,
    best_precision,
    choosing,
    fastest,
    set_precision,
)
from mmcastling.deploy import precision as precisions
from mmcastling.models import CastlingViT
from mmcastling.run import ConfigError, convert, evaluate, load_config

SIZE = (32, 48)


def vit(**options):
    arch = dict(embed_dims=24, num_layers=2, num_heads=2, feedforward_channels=48)
    options = dict(img_size=32, patch_size=8, out_type="featmap", **options)
    return CastlingViT(arch, **options).eval()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mmcastling" / "precision.json"


@pytest.fixture
def times(monkeypatch):
    """Seconds by precision, in place of a clock; what was timed is counted."""
    times = dict(fp32=0.872, bf16=0.245, fp16=0.870, int8=0.353, measured=0)

    def measured(passes, repeats):
        times["measured"] += 1
        assert repeats >= 3
        for run in passes.values():
            run()
        return {name: times[name] for name in passes}

    monkeypatch.setattr(choosing, "paired_medians", measured)
    monkeypatch.setattr(precisions, "computes_in", lambda dtype, device: True)
    monkeypatch.setattr(choosing, "gains_nothing", lambda *_: None)
    monkeypatch.setattr(choosing, "_check_memory", lambda *_: None)  # takes a second
    return times


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        (dict(fp32=1082, bf16=723, int8=547), "int8"),
        (dict(fp32=872, bf16=245, fp16=870, int8=353), "bf16"),
        (dict(fp32=100, bf16=91, int8=91), "fp32"),  # not notably
        (dict(fp32=100, bf16=90, int8=82), "bf16"),  # nor int8 over bf16
        (dict(fp32=100, bf16=95, int8=88), "int8"),
        (dict(int8=50, fp32=100), "int8"),  # in any order
        (dict(fp32=100), "fp32"),
    ],
)
def test_the_fastest_that_is_notably_faster_is_taken(milliseconds, expected):
    assert fastest(milliseconds) == expected


def test_it_says_what_and_why(file, times):
    model = vit(deploy=True)
    said = str(best_precision(model, SIZE))
    where = "bf16 (245 ms; fp32 872, fp16 870, int8 353) at 32x48"
    assert said == f"--precision auto: {where}, measured now"
    again = best_precision(model, SIZE)
    assert str(again) == f"--precision auto: {where}, as measured on {again.date}"
    assert times["measured"] == 1
    choice = PrecisionChoice("fp32", dict(fp32=1.0, int8=0.95), {}, SIZE)
    assert "fp32 (1000 ms; int8 950: none takes at most 90% of its time)" in str(choice)
    assert "fp32 (1000 ms) at" in str(PrecisionChoice("fp32", dict(fp32=1.0), {}, SIZE))


def test_the_model_is_not_changed(file, times):
    model = vit(deploy=True)
    before, weights = repr(model), copy.deepcopy(model.state_dict())
    best_precision(model, SIZE)
    assert repr(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]) and value.dtype == weights[name].dtype


def test_what_a_model_keeps_of_a_pass_is_its_own(file):
    class Keeper(torch.nn.Sequential):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    model = Keeper(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).train()
    assert best_precision(model, SIZE).seconds["fp32"] > 0
    assert not hasattr(model, "seen") and model.training
    assert model[1].num_batches_tracked.item() == 0


def test_another_size_model_machine_or_wish_is_measured_anew(file, times, monkeypatch):
    model = vit(deploy=True)
    best_precision(model, SIZE)
    best_precision(vit(deploy=True), SIZE)  # of the same structure, other weights
    assert times["measured"] == 1
    best_precision(model, (48, 32))
    best_precision(vit(deploy=True, ffn_conv=3), SIZE)
    best_precision(model, SIZE, remember=False)
    assert times["measured"] == 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    best_precision(model, SIZE)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_tile": True})
    best_precision(model, SIZE)
    assert times["measured"] == 6
    assert len(json.loads(file.read_text())) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:50],
        lambda text: "[1, 2]",
        lambda text: json.dumps(dict.fromkeys(json.loads(text), 7)),
        lambda text: json.dumps(
            {key: {"precision": "fp8"} for key in json.loads(text)}
        ),
        lambda text: text.replace('"bf16"', '"fp8"'),
        lambda text: text.replace("0.245", '"soon"'),
        lambda text: text.replace("32,", "null,"),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_is_written_anew(file, times, damage):
    model = vit(deploy=True)
    best_precision(model, SIZE)
    file.write_bytes(damage(file.read_text()).encode(errors="surrogateescape"))
    assert best_precision(model, SIZE).precision == "bf16" and times["measured"] == 2
    assert best_precision(model, SIZE).date and times["measured"] == 2


def test_what_cannot_be_remembered_is_said(file, times, caplog):
    file.parent.parent.joinpath("mmcastling").write_text("no folder")
    for measured in (1, 2):
        assert best_precision(vit(deploy=True), SIZE).precision == "bf16"
        assert times["measured"] == measured
    assert "is not remembered" in caplog.text


def test_what_is_far_from_float32_is_left_out(file, times, monkeypatch):
    def broken(model, name):
        set_precision(model, name)
        if name == "bf16":
            model.pos_embed.data[:] = torch.nan
        if name == "int8":
            model.ln1.weight.data.mul_(1.5)

    monkeypatch.setattr(choosing, "set_precision", broken)
    choice = best_precision(vit(deploy=True), SIZE)
    assert choice.precision == "fp32" and set(choice.seconds) == {"fp32", "fp16"}
    assert "bf16 is off by nan% of" in str(choice) and "int8 is off by" in str(choice)


def test_what_gains_nothing_is_not_measured(file, times, monkeypatch):
    monkeypatch.setattr(choosing, "gains_nothing", lambda name, _: name == "bf16")
    monkeypatch.setattr(
        precisions, "computes_in", lambda dtype, _: dtype is torch.bfloat16
    )
    choice = best_precision(vit(deploy=True), SIZE)
    assert choice.precision == "int8" and set(choice.seconds) == {"fp32", "int8"}
    assert str(choice).endswith(
        "; bf16 gains nothing here; fp16 has no instructions here"
    )


@pytest.mark.parametrize(
    ("prepare", "size", "message"),
    [
        (lambda m: m, (0, 32), r"size \(0, 32\): give a height and a width, two"),
        (lambda m: m, (32,), r"size \(32,\): give a height"),
        (lambda m: m, (4, 4), "CastlingViT refuses an image of 4x4 in fp32: .*smaller"),
        (lambda m: vit(), SIZE, "precision auto is for deployed models, and layers.0"),
        (lambda m: set_precision(m, "int8"), SIZE, "layers compute in int8 already"),
    ],
)
def test_bad_input_is_refused(file, times, prepare, size, message):
    model = vit(deploy=True)
    with pytest.raises(ValueError, match=message):
        best_precision(prepare(model) or model, size)
    assert times["measured"] == 0 and not file.exists()


def test_a_size_that_does_not_fit_says_what_it_needs(file):
    message = (
        r"size 800000x800000 does not fit into memory: \d precisions of CastlingViT "
        r"need about [\d,.]+ GB, and [\d,.]+ GB are free: choose a smaller size"
    )
    with pytest.raises(RuntimeError, match=message):
        best_precision(vit(deploy=True), (800000, 800000))


@pytest.mark.parametrize(
    ("precision", "has", "gains"),
    [
        ("bf16", ["avx512_f"], False),
        ("bf16", ["avx512_f", "avx512_bf16"], True),
        ("bf16", ["amx_tile", "amx_bf16"], True),
        ("fp16", ["avx512_fp16", "amx_bf16"], False),
        ("fp16", ["amx_fp16"], True),
        ("int8", [], True),
        ("fp32", [], True),
    ],
)
def test_a_precision_by_name_says_where_it_gains_nothing(
    monkeypatch, caplog, precision, has, gains
):
    found = dict.fromkeys(has, True) | {"architecture": "x86_64"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(precisions, "computes_in", lambda dtype, device: True)
    set_precision(vit(deploy=True), precision)
    warned = f"precision {precision} gains nothing on this machine: this CPU ("
    assert (warned in caplog.text) != gains


def test_other_processors_are_not_judged_by_their_flags(monkeypatch):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"}
    )
    assert precisions.gains_nothing("bf16") is None


# -- through the commands --------------------------------------------------------------


def test_a_detector_is_evaluated_and_converted_in_what_was_chosen(
    file, times, trained, tmp_path, capsys
):
    cfg = load_config(trained.config, work_dir=str(tmp_path / "w"))
    assert evaluate(cfg, trained.masks_off, precision="auto").precision == "bf16"
    said = "--precision auto: bf16 (245 ms; fp32 872, fp16 870, int8 353) at 128x128, "
    assert f"{said}measured now" in capsys.readouterr().out
    out = tmp_path / "deployed.pth"
    convert(cfg, trained.masks_off, out, precision="auto", verify=False)
    assert f"{said}as measured on" in capsys.readouterr().out
    assert load_config(out.with_suffix(".py")).precision == "bf16"
    assert times["measured"] == 1


def test_auto_needs_a_deployed_model_and_an_image(file, times, trained, tmp_path):
    cfg = load_config(trained.config, work_dir=str(tmp_path / "w"))
    with pytest.raises(ValueError, match=r"auto is for deployed.* leave --no-deploy"):
        evaluate(cfg, trained.masks_off, deploy=False, precision="auto")
    cfg.test_dataloader.dataset.data_root = str(tmp_path / "nothing")
    with pytest.raises(
        ConfigError, match=r"auto measures at .* choose one of \['fp32'"
    ):
        convert(cfg, trained.masks_off, tmp_path / "x.pth", precision="auto")
