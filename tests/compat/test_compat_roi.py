"""``mmcv.ops.RoIAlign`` and ``RoIPool`` against their definitions."""

import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmcastling.errors import UserError

# (image, x1, y1, x2, y2) on maps of 6 x 7 pixels at scale 1: inside, over every border,
# out of the image, without extent, thin
ROIS = [
    (0, 0.3, 0.6, 5.2, 4.9),
    (1, -3.1, -2.2, 4.4, 3.3),
    (1, 3.7, 2.9, 11.45, 9.8),
    (0, 20.0, 20.0, 24.0, 26.0),
    (1, 2.4, 2.4, 2.4, 2.4),
    (0, 1.1, 0.2, 1.3, 5.9),
]


def maps(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64).to(dtype)


def hat(position: float, size: int, like: Tensor) -> Tensor:
    """Weights that interpolate linearly at a position between pixels, ``(size,)``."""
    pixels = torch.arange(size, dtype=like.dtype)
    return (1 - (pixels - position).abs()).clamp(min=0)


def slow_sample(image: Tensor, y: float, x: float) -> Tensor:
    """Bilinear value, ``(C,)``; the border pixel lasts one pixel, then come zeros."""
    _, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return image.new_zeros(len(image))
    rows = hat(min(max(y, 0.0), height - 1.0), height, image)
    columns = hat(min(max(x, 0.0), width - 1.0), width, image)
    return (image * rows[:, None] * columns).sum((1, 2))


def slow_roi_align(
    images: Tensor,
    rois: list[tuple[float, ...]],
    size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Every bin of every box: the mean of a regular grid of samples."""
    pooled = []
    for number, *corners in rois:
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in corners)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        rows = sampling_ratio or math.ceil(height / size[0])
        columns = sampling_ratio or math.ceil(width / size[1])
        for i in range(size[0]):
            for j in range(size[1]):
                samples = [
                    slow_sample(
                        images[int(number)],
                        y1 + (i + (r + 0.5) / rows) * height / size[0],
                        x1 + (j + (c + 0.5) / columns) * width / size[1],
                    )
                    for r in range(rows)
                    for c in range(columns)
                ]
                if not samples:
                    pooled.append(images.new_zeros(images.shape[1]))
                else:
                    pooled.append(torch.stack(samples).mean(0))
    return torch.stack(pooled).view(len(rois), *size, -1).permute(0, 3, 1, 2)


def slow_roi_pool(
    images: Tensor, rois: list[tuple[float, ...]], size: tuple[int, int], scale: float
) -> Tensor:
    """The box with its last pixel, divided, each bin rounded outwards: the maximum."""
    height, width = images.shape[2:]

    def clip(value: int, limit: int) -> int:
        return min(max(value, 0), limit)

    pooled = []
    for number, x1, y1, x2, y2 in rois:
        left, top = x1 * scale, y1 * scale
        box_w, box_h = (x2 + 1) * scale - left, (y2 + 1) * scale - top
        for i in range(size[0]):
            for j in range(size[1]):
                first_row = clip(math.floor(i * (box_h / size[0]) + top), height)
                end_row = clip(math.ceil((i + 1) * (box_h / size[0]) + top), height)
                first_col = clip(math.floor(j * (box_w / size[1]) + left), width)
                end_col = clip(math.ceil((j + 1) * (box_w / size[1]) + left), width)
                pixels = images[int(number), :, first_row:end_row, first_col:end_col]
                if box_w <= 0 or box_h <= 0 or pixels.numel() == 0:
                    pooled.append(images.new_zeros(images.shape[1]))
                else:
                    pooled.append(pixels.flatten(1).max(1).values)
    return torch.stack(pooled).view(len(rois), *size, -1).permute(0, 3, 1, 2)


def assert_same_with_gradient(actual: Tensor, expected: Tensor, image: Tensor) -> None:
    """Equal values, and equal gradients of a random weighting of them."""
    torch.testing.assert_close(actual, expected)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    (grad,) = torch.autograd.grad(actual, image, weights)
    (expected_grad,) = torch.autograd.grad(expected, image, weights)
    assert expected_grad.abs().max() > 0
    torch.testing.assert_close(grad, expected_grad)


ALIGN_CASES = [
    pytest.param(
        aligned,
        ratio,
        scale,
        id=f"{'aligned' if aligned else 'legacy'}-ratio{ratio}-scale{scale}",
    )
    for aligned in (True, False)
    for ratio in (0, 1, 2)
    for scale in (1.0, 0.37)
]


@pytest.mark.parametrize(("aligned", "ratio", "scale"), ALIGN_CASES)
def test_roi_align_follows_the_definition(
    mmcv_ops: ModuleType, aligned: bool, ratio: int, scale: float
) -> None:
    image = maps().requires_grad_()
    rois = torch.tensor(ROIS, dtype=image.dtype)
    layer = mmcv_ops.RoIAlign((2, 3), scale, ratio, "avg", aligned)
    expected = slow_roi_align(image, ROIS, (2, 3), scale, ratio, aligned)
    assert_same_with_gradient(layer(image, rois), expected, image)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    bins=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    shape=st.tuples(*[st.integers(1, size) for size in (2, 2, 5, 5)]),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_roi_align_follows_the_definition_for_any_shape(
    mmcv_ops: ModuleType,
    bins: tuple[int, int],
    shape: tuple[int, int, int, int],
    count: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator, dtype=torch.float64)
    near = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 8 - 2
    far = near + torch.rand(count, 2, generator=generator, dtype=torch.float64) * 8
    number = torch.randint(shape[0], (count, 1), generator=generator)
    rois = torch.cat([number, near, far], 1)
    actual = mmcv_ops.roi_align(image, rois, bins, 0.7, 0, "avg", True)
    expected = slow_roi_align(image, rois.tolist(), bins, 0.7, 0, True)
    torch.testing.assert_close(actual, expected)


def test_maximum_of_roi_align_needs_compiled_ops(mmcv_ops: ModuleType) -> None:
    with pytest.raises(UserError, match="pool_mode='max' needs an mmcv with compiled"):
        mmcv_ops.roi_align(maps(), torch.tensor(ROIS).double(), 2, 1.0, 0, "max", True)


@pytest.mark.parametrize("scale", [1.0, 0.37, 0.125])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4)], ids=str)
def test_roi_pool_follows_the_definition(
    mmcv_ops: ModuleType, size: tuple[int, int], scale: float
) -> None:
    image = maps().requires_grad_()
    inverted = (0, 4.0, 4.0, 1.0, 1.0)
    boxes = [*ROIS, inverted]
    rois = torch.tensor(boxes, dtype=image.dtype)
    expected = slow_roi_pool(image, boxes, size, scale)
    assert_same_with_gradient(
        mmcv_ops.RoIPool(size, scale)(image, rois), expected, image
    )


OPS = {
    "align": lambda ops, x, rois: ops.roi_align(x, rois, 2, 0.5, 0, "avg", True),
    "pool": lambda ops, x, rois: ops.roi_pool(x, rois, 2, 0.5),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_formats_round_only_the_result(
    mmcv_ops: ModuleType, op: str, dtype: torch.dtype
) -> None:
    # Boxes stay in float32, as mmdet passes them.
    rois = torch.tensor(ROIS)
    half = maps(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    actual, expected = (OPS[op](mmcv_ops, x, rois) for x in (half, full))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected.to(dtype), rtol=0, atol=0)
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("batch", "channels", "count"),
    [(2, 3, 0), (0, 3, 0), (2, 0, 2)],
    ids=["no-rois", "no-images", "no-channels"],
)
def test_empty_input_gives_empty_output_and_zero_gradient(
    mmcv_ops: ModuleType, op: str, batch: int, channels: int, count: int
) -> None:
    image = torch.randn(batch, channels, 4, 4, requires_grad=True)
    rois = torch.tensor(ROIS[:count]).view(count, 5)
    pooled = OPS[op](mmcv_ops, image, rois)
    assert pooled.shape == (count, channels, 2, 2)
    pooled.sum().backward()
    torch.testing.assert_close(image.grad, torch.zeros_like(image))


@pytest.mark.parametrize("op", OPS)
def test_strided_input_and_gradient_are_read_in_order(
    mmcv_ops: ModuleType, op: str
) -> None:
    rois = torch.tensor(ROIS, dtype=torch.float64)
    plain = maps().requires_grad_()
    strided = maps().to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(2, 2, 3, len(ROIS), dtype=torch.float64).permute(3, 2, 0, 1)
    for image in (plain, strided):
        (OPS[op](mmcv_ops, image, rois) * weights).sum().backward()
    torch.testing.assert_close(strided.grad, plain.grad)
