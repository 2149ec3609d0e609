"""``mmcv.ops.sigmoid_focal_loss`` by its definition."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

CLASSES = 4
# The last is background.
TARGET = torch.tensor([0, 2, 3, 1, 2, CLASSES])
CASES = [
    pytest.param(gamma, alpha, weighted, id=f"g{gamma}-a{alpha}-weighted{weighted}")
    for gamma, alpha in [(2.0, 0.25), (0.0, 0.5), (1.5, 0.75)]
    for weighted in (False, True)
]


def logits(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(TARGET), CLASSES, generator=generator, dtype=torch.float64)
    return (3 * values).to(dtype).requires_grad_()


def class_weight(weighted: bool) -> Tensor | None:
    return torch.tensor([0.5, 1.0, 2.0, 3.0]).double() if weighted else None


def slow_sigmoid_loss(
    x: Tensor, target: Tensor, gamma: float, alpha: float, weight: Tensor | None
) -> Tensor:
    rows = []
    for sample, label in zip(x, target.tolist(), strict=True):
        factor = weight[label] if weight is not None and label < len(weight) else 1.0
        for channel, logit in enumerate(sample):
            p = torch.sigmoid(logit)
            if channel == label:
                loss = -alpha * (1 - p) ** gamma * torch.log(p)
            else:
                loss = -(1 - alpha) * p**gamma * torch.log(1 - p)
            rows.append(factor * loss)
    return torch.stack(rows).view_as(x)


def assert_same_with_gradient(actual: Tensor, expected: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 2, expected.numel()).view_as(expected).double()
    (grad,) = torch.autograd.grad(actual, x, weights)
    (expected_grad,) = torch.autograd.grad(expected, x, weights)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize(("gamma", "alpha", "weighted"), CASES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_loss_follows_the_definition(
    mmcv_ops: ModuleType, reduction: str, gamma: float, alpha: float, weighted: bool
) -> None:
    x, weight = logits(), class_weight(weighted)
    layer = mmcv_ops.SigmoidFocalLoss(gamma, alpha, weight, reduction)
    expected = slow_sigmoid_loss(x, TARGET, gamma, alpha, weight)
    # mmcv's mean divides by the samples, not by the elements
    expected = {
        "none": expected,
        "mean": expected.sum() / len(x),
        "sum": expected.sum(),
    }[reduction]
    assert_same_with_gradient(layer(x, TARGET), expected, x)


@pytest.mark.parametrize("logit", [-200.0, -40.0, 40.0, 200.0])
@pytest.mark.parametrize("label", [0, 1], ids=["own", "other"])
def test_sigmoid_loss_of_extreme_float32_logits_is_exact(
    mmcv_ops: ModuleType, logit: float, label: int
) -> None:
    x = torch.tensor([[logit]], requires_grad=True)
    loss = mmcv_ops.sigmoid_focal_loss(x, torch.tensor([label]), 2.0, 0.25, None, "sum")
    loss.backward()
    wrong = logit < 0 if label == 0 else logit > 0
    factor = 0.25 if label == 0 else 0.75
    # log(sigmoid(-t)) is -t and the modulating factor 1 for large t
    expected = factor * abs(logit) if wrong else 0.0
    slope = (factor if logit > 0 else -factor) if wrong else 0.0
    torch.testing.assert_close(loss.item(), expected)
    torch.testing.assert_close(x.grad.item(), slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_formats_round_only_the_result(
    mmcv_ops: ModuleType, dtype: torch.dtype
) -> None:
    half = logits(dtype).detach().requires_grad_()
    full = half.detach().float().requires_grad_()
    for x in (half, full):
        mmcv_ops.sigmoid_focal_loss(x, TARGET, 2.0, 0.25, None, "none").sum().backward()
    torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=0, atol=0)


def test_no_samples_give_zero(mmcv_ops: ModuleType) -> None:
    x = torch.zeros(0, CLASSES, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long)
    loss = mmcv_ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, CLASSES)
