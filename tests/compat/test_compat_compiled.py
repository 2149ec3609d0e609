"""The kernels against mmcv's compiled ops on the CPU, where an mmcv has them."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcastling.compat import mmcv_ext
from mmcastling.compat.mmcv_ops import KERNELS

Arguments = tuple[list[Any], dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    module = importlib.import_module("mmcv._ext")
    if module.__spec__.origin == mmcv_ext.__name__:
        pytest.skip("this mmcv has no compiled ops to compare with")
    return module


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def boxes(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    near = torch.rand(count, 2, generator=generator) * 60
    far = near + torch.rand(count, 2, generator=generator) * 50 + 1
    return torch.cat([near, far], 1), torch.rand(count, generator=generator)


def nms_arguments(offset: int, count: int = 200) -> Arguments:
    return [*boxes(count)], {"iou_threshold": 0.4, "offset": offset}


def softnms_arguments(method: int, min_score: float, offset: int) -> Arguments:
    dets = torch.zeros(60, 5)
    settings = {"iou_threshold": 0.3, "sigma": 0.5, "min_score": min_score}
    return [*boxes(60), dets], settings | {"method": method, "offset": offset}


def deform_settings() -> dict[str, int]:
    return {
        **{"kW": 3, "kH": 3, "dW": 2, "dH": 1, "padW": 1, "padH": 2},
        **{"dilationW": 1, "dilationH": 2, "group": 2, "deformable_group": 2},
        "im2col_step": 2,
    }


def modulated_settings(with_bias: bool) -> dict[str, Any]:
    return {
        **{"kernel_h": 3, "kernel_w": 3, "stride_h": 1, "stride_w": 2},
        **{"pad_h": 2, "pad_w": 1, "dilation_h": 2, "dilation_w": 1},
        **{"group": 2, "deformable_group": 2, "with_bias": with_bias},
    }


def scratch() -> Tensor:
    return torch.empty(0)


IMAGE, WEIGHT, OUT = (2, 4, 7, 9), (6, 2, 3, 3), (2, 6, 7, 5)
OFFSET, MASK = (2, 36, 7, 5), (2, 18, 7, 5)


def deform_forward() -> Arguments:
    tensors = [randn(*IMAGE), randn(*WEIGHT), randn(*OFFSET), torch.zeros(OUT)]
    return [*tensors, scratch(), scratch()], deform_settings()


def deform_backward_input() -> Arguments:
    data = [randn(*IMAGE), randn(*OFFSET), randn(*OUT)]
    grads = [torch.zeros(IMAGE), torch.zeros(OFFSET)]
    return [*data, *grads, randn(*WEIGHT), scratch()], deform_settings()


def deform_backward_parameters() -> Arguments:
    data = [randn(*IMAGE), randn(*OFFSET), randn(*OUT), torch.zeros(WEIGHT)]
    return [*data, scratch(), scratch()], deform_settings() | {"scale": 1}


def modulated_forward(with_bias: bool) -> Arguments:
    bias = randn(6) if with_bias else scratch()
    head = [randn(*IMAGE), randn(*WEIGHT), bias, scratch()]
    tail = [randn(*OFFSET), randn(*MASK), torch.zeros(OUT), scratch()]
    return head + tail, modulated_settings(with_bias)


def modulated_backward(with_bias: bool) -> Arguments:
    bias = (6,) if with_bias else (0,)
    head = [randn(*IMAGE), randn(*WEIGHT), torch.zeros(bias), scratch()]
    shapes = (IMAGE, WEIGHT, bias, OFFSET, MASK)
    grads = [torch.zeros(shape) for shape in shapes]
    tail = [randn(*OFFSET), randn(*MASK), scratch(), *grads, randn(*OUT)]
    return head + tail, modulated_settings(with_bias)


CASES: dict[str, tuple[str, Callable[[], Arguments]]] = {
    "nms": ("nms", lambda: nms_arguments(0)),
    "nms-offset": ("nms", lambda: nms_arguments(1)),
    "nms-empty": ("nms", lambda: nms_arguments(0, 0)),
    **{
        f"softnms-{method}-{min_score}-{offset}": (
            "softnms",
            lambda m=method, s=min_score, o=offset: softnms_arguments(m, s, o),
        )
        for method in (0, 1, 2)
        for min_score in (1e-3, 0.3, 2.0)
        for offset in (0, 1)
    },
    "deform-forward": ("deform_conv_forward", deform_forward),
    "deform-data": ("deform_conv_backward_input", deform_backward_input),
    "deform-weight": ("deform_conv_backward_parameters", deform_backward_parameters),
    "modulated-forward": (
        "modulated_deform_conv_forward",
        lambda: modulated_forward(True),
    ),
    "modulated-forward-no-bias": (
        "modulated_deform_conv_forward",
        lambda: modulated_forward(False),
    ),
    "modulated-backward": (
        "modulated_deform_conv_backward",
        lambda: modulated_backward(True),
    ),
    "modulated-backward-no-bias": (
        "modulated_deform_conv_backward",
        lambda: modulated_backward(False),
    ),
}


@pytest.mark.parametrize(("name", "arguments"), CASES.values(), ids=CASES)
def test_kernel_does_what_the_compiled_op_does(
    compiled: ModuleType, name: str, arguments: Callable[[], Arguments]
) -> None:
    (tensors, settings), (expected_tensors, _) = arguments(), arguments()
    result = KERNELS[name](*tensors, **settings)
    expected = getattr(compiled, name)(*expected_tensors, **settings)
    if name == "softnms":  # the compiled op leaves rubbish below the kept rows
        tensors[2], expected_tensors[2] = (
            tensors[2][: len(result)],
            expected_tensors[2][: len(expected)],
        )
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(tensors, expected_tensors, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "legacy"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_does_what_the_compiled_op_does(
    compiled: ModuleType, aligned: bool, sampling_ratio: int
) -> None:
    corners, _ = boxes(20)
    rois = torch.cat([torch.arange(20)[:, None] % 2, corners - 5], 1)
    settings = {"aligned_height": 3, "aligned_width": 2, "spatial_scale": 0.25}
    settings |= {"sampling_ratio": sampling_ratio, "pool_mode": 1}
    settings |= {"aligned": aligned}
    image, shape = randn(2, 3, 20, 25), (20, 3, 3, 2)
    winners = [scratch(), scratch()]
    results = []
    for ext in (KERNELS["roi_align_forward"], compiled.roi_align_forward):
        output = torch.zeros(shape)
        ext(image, rois, output, *winners, **settings)
        results.append(output)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    grads = []
    for ext in (KERNELS["roi_align_backward"], compiled.roi_align_backward):
        grad = torch.zeros(2, 3, 20, 25)
        ext(randn(*shape), rois, *winners, grad, **settings)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
