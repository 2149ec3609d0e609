"""Mixed precision on the CPU: a detector on padded, non-square, odd-sized batches."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.testing import assert_close

from mmcastling.train import DeviceAmpOptimWrapper
from mmcastling.verbs import castling_modules, set_mask

KIND = "mmcastling.DeviceAmpOptimWrapper"


def wrap(model, optimizer=None, **options):
    optimizer = optimizer or dict(type="SGD", lr=0.1)
    return build_optim_wrapper(model, dict(optimizer=optimizer, **options))


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr("mmcastling.train.amp.get_device", lambda: "cpu")


# -- the detector ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector_cfg(root):
    import mmdet.models  # noqa: F401

    cfg = Config.fromfile(root / "configs" / "mask_rcnn_castling_nano_nuclei.py").model
    for head in ("bbox_head", "mask_head"):
        cfg.roi_head[head].num_classes = 4
    return cfg


def train_detector(cfg, iterations=3, **options):
    """First loss and gradient norm, and the model and its wrapper after the last."""
    from mmdet.testing import demo_mm_inputs

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg).train()
    wrapper = wrap(
        model, dict(type="AdamW", lr=1e-3), clip_grad=dict(max_norm=1e9), **options
    )
    first = None
    for i in range(iterations):
        if i == iterations - 1:
            set_mask(model, 1.0)  # the last one without the branch
        # Two sizes, odd and not square, that padding joins to 128x144.
        batch = demo_mm_inputs(
            2, [(3, 97, 131), (3, 113, 75)], num_classes=4, with_mask=True
        )
        torch.manual_seed(i)  # which anchors and boxes are sampled
        log = model.train_step(batch, wrapper)
        assert all(value.isfinite().all() for value in log.values()), (i, log)
        norm = wrapper.message_hub.get_scalar("train/grad_norm").current()
        assert 0 < norm < float("inf"), i
        first = first or (log["loss"].item(), norm)
        densities = [module.branch.density for _, module in castling_modules(model)]
        assert all((density > 0) == (i < iterations - 1) for density in densities)
    return first, model, wrapper


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.long
def test_a_detector_trains_with_finite_losses_and_gradients(dtype, detector_cfg):
    exact, _, _ = train_detector(detector_cfg, iterations=1)
    first, model, wrapper = train_detector(detector_cfg, type=KIND, dtype=dtype)

    assert_close(first[0], exact[0], rtol=0.02, atol=0)
    assert_close(first[1], exact[1], rtol=0.1, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name
    # No step was left out, which would have halved the scale or left states missing.
    scale = wrapper.loss_scaler.get_scale()
    assert scale == (65536.0 if dtype == "float16" else 1.0)
    states = wrapper.optimizer.state.values()
    assert {int(state["step"]) for state in states} == {3}


# -- the wrapper -----------------------------------------------------------------------


def step(model, wrapper, x):
    with wrapper.optim_context(model):
        out = model(x)
    wrapper.update_params(out.float().square().mean())
    return out


@pytest.mark.parametrize(
    ("dtype", "cast", "scaled"),
    [
        ("float16", torch.float16, True),
        (torch.float16, torch.float16, True),
        ("bfloat16", torch.bfloat16, False),
        (None, torch.bfloat16, False),
    ],
)
def test_forward_is_cast_and_only_float16_is_scaled(dtype, cast, scaled):
    model = nn.Linear(4, 4)
    wrapper = wrap(model, type=KIND, dtype=dtype)
    assert isinstance(wrapper, DeviceAmpOptimWrapper)
    assert wrapper.loss_scaler.is_enabled() == scaled
    before = model.weight.detach().clone()
    assert step(model, wrapper, 0.1 * torch.randn(2, 4)).dtype == cast
    assert (model.weight - before).abs().max() > 0
    assert model(torch.randn(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_a_precision_that_is_emulated_is_said_to_be_slow(
    supported, monkeypatch, caplog
):
    monkeypatch.setattr("mmcastling.train.amp.computes_in", lambda *_: supported)
    wrap(nn.Linear(4, 4), type=KIND, dtype="float16")
    assert ("torch.float16: this cpu has no instructions" in caplog.text) != supported


def test_small_gradients_survive_float16_through_the_scale():
    """A gradient of 1e-8 is zero in float16; the scale brings it through."""
    moved = {}
    for enabled in (True, False):
        model = nn.Linear(1, 1, bias=False)
        scale = dict(enabled=enabled)
        sgd = dict(type="SGD", lr=1e6)
        wrapper = wrap(model, sgd, type=KIND, dtype="float16", loss_scale=scale)
        before = model.weight.item()
        with wrapper.optim_context(model):
            out = model(torch.ones(1, 1))
        wrapper.update_params((out.float() * 1e-8).sum())
        moved[enabled] = before - model.weight.item()
    assert moved[False] == 0.0
    assert moved[True] == pytest.approx(0.01, rel=0.01)


def test_an_overflow_leaves_the_step_out_and_halves_the_scale():
    model = nn.Linear(4, 4)
    wrapper = wrap(model, type=KIND, dtype="float16", clip_grad=dict(max_norm=1.0))
    before = model.weight.detach().clone()
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 4))
    wrapper.update_params((out.float() * 1e36).sum())
    assert_close(model.weight.detach(), before, atol=0, rtol=0)
    assert wrapper.loss_scaler.get_scale() == 65536.0 / 2


def test_clipping_sees_unscaled_gradients():
    model = nn.Linear(4, 4, bias=False)
    options = dict(dtype="float16", loss_scale=128, clip_grad=dict(max_norm=0.5))
    wrapper = wrap(model, dict(type="SGD", lr=1.0), type=KIND, **options)
    before = model.weight.detach().clone()
    step(model, wrapper, 10 * torch.randn(2, 4))
    assert_close((model.weight - before).norm().item(), 0.5, rtol=1e-3, atol=0)


def test_a_fixed_scale_stays():
    model = nn.Linear(4, 4)
    wrapper = wrap(model, type=KIND, dtype="float16", loss_scale=128)
    step(model, wrapper, torch.randn(2, 4))
    assert wrapper.loss_scaler.get_scale() == 128.0


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", ["float16", "bfloat16", None])
def test_a_run_is_resumed_in_another_precision(source, target):
    model = nn.Linear(4, 4)
    kind = dict(type=KIND, dtype=source) if source else dict(type="OptimWrapper")
    wrapper = wrap(model, dict(type="AdamW", lr=1e-3), **kind)
    step(model, wrapper, 0.1 * torch.randn(2, 4))
    other = wrap(model, dict(type="AdamW", lr=1e-3), type=KIND, dtype=target)
    other.load_state_dict(wrapper.state_dict())
    step(model, other, 0.1 * torch.randn(2, 4))
    assert {int(s["step"]) for s in other.optimizer.state.values()} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="float8"), "dtype 'float8' is not a half precision"),
        (dict(dtype="float32"), r"choose one of \['float16', 'bfloat16'\]"),
        (dict(loss_scale="static"), "loss_scale 'static' must be 'dynamic', a number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        wrap(nn.Linear(2, 2), type=KIND, **options)


def test_a_device_without_autocast_is_named(monkeypatch):
    monkeypatch.setattr("mmcastling.train.amp.get_device", lambda: "meta")
    with pytest.raises(ValueError, match="no automatic mixed precision on 'meta'"):
        wrap(nn.Linear(2, 2), type=KIND)
