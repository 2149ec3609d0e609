"""Adaptive gradient clipping against timm's, and what it is for."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.testing import assert_close

from mmcastling.train import AGCOptimWrapper


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4)
    )


def gradients(model):
    x = 30 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def wrapper(model, **options):
    optimizer = dict(type="SGD", lr=1.0)
    cfg = dict(type="mmcastling.AGCOptimWrapper", optimizer=optimizer, **options)
    return build_optim_wrapper(model, cfg)


def test_it_clips_as_timm_does():
    timm = pytest.importorskip("timm")
    model, reference = network(), network()
    before, _ = gradients(model), gradients(reference)
    timm.utils.adaptive_clip_grad(reference.parameters(), clip_factor=0.01)
    optim = wrapper(model)
    assert isinstance(optim, AGCOptimWrapper)
    optim._clip_grad()
    clipped = 0
    for own, theirs, raw in zip(
        model.parameters(), reference.parameters(), before, strict=True
    ):
        assert_close(own.grad, theirs.grad)
        clipped += not torch.equal(own.grad, raw)
    assert clipped


def test_no_row_moves_by_more_than_the_factor():
    model = network()
    optim = wrapper(model, clip_factor=0.02)
    before = copy.deepcopy(model.state_dict())
    gradients(model)
    optim.step()
    for name in ("0.weight", "3.weight"):
        old, new = before[name].flatten(1), model.state_dict()[name].flatten(1)
        share = (new - old).norm(dim=1) / old.norm(dim=1)
        assert share.max() <= 0.02 + 1e-5
        assert share.max() > 0.01


def test_small_gradients_are_left_alone():
    model = network()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-9)
    wrapper(model)._clip_grad()
    assert all((p.grad == 1e-9).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clip_factor=0.0), "clip_factor=0.0 must be above 0"),
        (dict(clip_grad=dict(max_norm=1.0)), "beside adaptive clipping"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        wrapper(network(), **options)
