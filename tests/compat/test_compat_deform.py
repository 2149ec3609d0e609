"""Deformable convolutions, v1 and v2, against their definition."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from mmcastling.compat.mmcv_ops import deform as kernels

# kernel, stride, padding, dilation, groups, deform_groups
CASES = {
    "plain-3x3": ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    "oblong": ((2, 3), (1, 2), (0, 1), (1, 1), 1, 1),
    "stride-dilation": ((3, 2), (2, 1), (2, 1), (2, 1), 1, 1),
    "groups": ((3, 3), (2, 2), (1, 1), (1, 1), 2, 1),
    "deform-groups": ((2, 2), (2, 1), (1, 0), (1, 2), 2, 2),
    "pointwise": ((1, 1), (1, 1), (0, 0), (1, 1), 1, 2),
}
case = pytest.mark.parametrize("geometry", CASES.values(), ids=CASES)


def sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear value of every channel, ``(C,)``, with zeros around the image."""
    rows = torch.arange(image.shape[1], dtype=image.dtype)
    columns = torch.arange(image.shape[2], dtype=image.dtype)
    row_weights = (1 - (rows - y).abs()).clamp(min=0)
    column_weights = (1 - (columns - x).abs()).clamp(min=0)
    return (image * row_weights[:, None] * column_weights).sum((1, 2))


def slow_deform_conv(
    image: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple,
) -> Tensor:
    """Every output pixel: the kernel's taps, each moved, interpolated and scaled."""
    kernel, stride, padding, dilation, groups, deform_groups = geometry
    batch, channels = image.shape[:2]
    height, width = offset.shape[2:]
    share = channels // deform_groups
    taps = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    rows = []
    for n in range(batch):
        for oy in range(height):
            for ox in range(width):
                columns = []  # one (C,) vector per tap
                for t, (i, j) in enumerate(taps):
                    parts = []
                    for g in range(deform_groups):
                        at = g * len(taps) + t
                        dy, dx = offset[n, 2 * at : 2 * at + 2, oy, ox]
                        y = oy * stride[0] - padding[0] + i * dilation[0] + dy
                        x = ox * stride[1] - padding[1] + j * dilation[1] + dx
                        own = image[n, g * share : (g + 1) * share]
                        value = sample(own, y, x)
                        parts.append(
                            value if mask is None else value * mask[n, at, oy, ox]
                        )
                    columns.append(torch.cat(parts))
                patch = torch.stack(columns, 1).view(groups, -1)
                kernels = weight.reshape(groups, len(weight) // groups, -1)
                out = (kernels * patch[:, None]).sum(-1).flatten()
                rows.append(out if bias is None else out + bias)
    return torch.stack(rows).view(batch, height, width, -1).permute(0, 3, 1, 2)


def tensors(geometry: tuple, batch: int = 2) -> dict[str, Tensor]:
    kernel, stride, padding, dilation, groups, deform_groups = geometry
    size = [
        (extent + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d, extent in enumerate((4, 5))
    ]
    taps = deform_groups * kernel[0] * kernel[1]
    shapes = {
        "image": (batch, 4, 4, 5),
        "offset": (batch, 2 * taps, *size),
        "mask": (batch, taps, *size),
        "weight": (6, 4 // groups, *kernel),
        "bias": (6,),
    }
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    values["offset"] *= 1.5  # far enough to leave the image
    return {name: value.requires_grad_() for name, value in values.items()}


def assert_same_with_gradients(
    actual: Tensor, expected: Tensor, inputs: list[Tensor]
) -> None:
    torch.testing.assert_close(actual, expected)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, weights),
        torch.autograd.grad(expected, inputs, weights),
    )


@case
def test_v1_follows_the_definition(mmcv_ops: ModuleType, geometry: tuple) -> None:
    t = tensors(geometry)
    actual = mmcv_ops.deform_conv2d(t["image"], t["offset"], t["weight"], *geometry[1:])
    expected = slow_deform_conv(
        t["image"], t["offset"], None, t["weight"], None, geometry
    )
    inputs = [t["image"], t["offset"], t["weight"]]
    assert_same_with_gradients(actual, expected, inputs)


@case
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_v2_follows_the_definition(
    mmcv_ops: ModuleType, geometry: tuple, with_bias: bool
) -> None:
    t = tensors(geometry)
    bias = t["bias"] if with_bias else None
    actual = mmcv_ops.modulated_deform_conv2d(
        t["image"], t["offset"], t["mask"], t["weight"], bias, *geometry[1:]
    )
    expected = slow_deform_conv(
        t["image"], t["offset"], t["mask"], t["weight"], bias, geometry
    )
    names = ["image", "offset", "mask", "weight"] + ["bias"] * with_bias
    assert_same_with_gradients(actual, expected, [t[name] for name in names])


@pytest.mark.parametrize("name", ["DeformConv2dPack", "ModulatedDeformConv2dPack"])
def test_layer_without_offsets_is_a_convolution(
    mmcv_ops: ModuleType, name: str
) -> None:
    # Both layers start with offsets of zero, v2 with a mask of sigmoid(0).
    torch.manual_seed(0)
    layer = getattr(mmcv_ops, name)(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 6)
    scale = 0.5 if name.startswith("Modulated") else 1.0
    bias = getattr(layer, "bias", None)
    expected = torch.nn.functional.conv2d(x, scale * layer.weight, bias, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_v1_weight_gradient_alone(mmcv_ops: ModuleType) -> None:
    geometry = CASES["groups"]
    t = tensors(geometry)
    image, offset = t["image"].detach(), t["offset"].detach()
    actual = mmcv_ops.deform_conv2d(image, offset, t["weight"], *geometry[1:])
    expected = slow_deform_conv(image, offset, None, t["weight"], None, geometry)
    assert_same_with_gradients(actual, expected, [t["weight"]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_formats_round_only_the_result(
    mmcv_ops: ModuleType, dtype: torch.dtype
) -> None:
    geometry = CASES["plain-3x3"]
    half = {
        name: value.detach().to(dtype).requires_grad_()
        for name, value in tensors(geometry).items()
    }
    full = {
        name: value.detach().float().requires_grad_() for name, value in half.items()
    }
    outputs = [
        mmcv_ops.modulated_deform_conv2d(
            t["image"], t["offset"], t["mask"], t["weight"], t["bias"], *geometry[1:]
        )
        for t in (half, full)
    ]
    torch.testing.assert_close(outputs[0], outputs[1].to(dtype), rtol=0, atol=0)
    grads = [
        torch.autograd.grad(output.sum(), list(t.values()))
        for output, t in zip(outputs, (half, full), strict=True)
    ]
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected.to(dtype))


def test_kernels_of_no_images_are_empty_with_zero_gradients() -> None:
    # mmcv's Python refuses an empty batch before it gets here; the op need not.
    t = {name: v.detach() for name, v in tensors(CASES["plain-3x3"], batch=0).items()}
    scratch = torch.empty(0)
    settings = {
        **{"kernel_h": 3, "kernel_w": 3, "stride_h": 1, "stride_w": 1, "pad_h": 1},
        **{"pad_w": 1, "dilation_h": 1, "dilation_w": 1, "group": 1},
        **{"deformable_group": 1, "with_bias": True},
    }
    head = (t["image"], t["weight"], t["bias"], scratch, t["offset"], t["mask"])
    output = torch.zeros(0, 6, 4, 5, dtype=torch.float64)
    kernels.modulated_deform_conv_forward(*head, output, scratch, **settings)
    names = ("image", "weight", "bias", "offset", "mask")
    grads = [torch.full_like(t[name], 7.0) for name in names]
    kernels.modulated_deform_conv_backward(*head, scratch, *grads, output, **settings)
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros_like(grad))
