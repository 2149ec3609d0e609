"""``mmcv.ops.nms``, ``batched_nms`` and ``soft_nms`` against their definitions."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmcastling.compat.mmcv_ops import nms as kernels

quick = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def slow_iou(a: list[float], b: list[float], offset: int) -> float:
    """Intersection over union of two boxes, 0 where both have no area."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    union = area_a + area_b - width * height
    return width * height / union if union else 0.0


def slow_nms(
    boxes: list[list[float]], scores: list[float], threshold: float, offset: int
) -> list[int]:
    """Take boxes by falling score, unless a taken one overlaps by more."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(slow_iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def slow_soft_nms(
    boxes: list[list[float]],
    scores: list[float],
    threshold: float,
    sigma: float,
    min_score: float,
    method: str,
    offset: int,
) -> tuple[list[int], list[float]]:
    """The compiled op's walk over one array, position by position."""
    factor = {
        "naive": lambda iou: 0.0 if iou >= threshold else 1.0,
        "linear": lambda iou: 1 - iou if iou >= threshold else 1.0,
        "gaussian": lambda iou: math.exp(-(iou * iou) / sigma),
    }[method]
    array = [(score, index) for index, score in enumerate(scores)]
    start = 0
    while start < len(array):
        # max() returns the first of equals
        best = max(range(start, len(array)), key=lambda i: array[i][0])
        array[start], array[best] = array[best], array[start]
        taken = array[start][1]
        position = start + 1
        while position < len(array):
            score, index = array[position]
            score *= factor(slow_iou(boxes[taken], boxes[index], offset))
            if score < min_score:
                last = array.pop()
                if position < len(array):
                    array[position] = last  # not decayed yet, so looked at next
            else:
                array[position] = (score, index)
                position += 1
        start += 1
    return [index for _, index in array], [score for score, _ in array]


@st.composite
def coarse_detections(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Few distinct coordinates and scores: ties, duplicates and empty boxes."""
    count = draw(st.integers(0, 12))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    near = torch.randint(0, 6, (count, 2), generator=generator)
    size = torch.randint(0, 6, (count, 2), generator=generator)
    scores = torch.randint(0, 5, (count,), generator=generator) / 4
    return torch.cat([near, near + size], 1).double(), scores.double()


def random_detections(
    count: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    near = torch.rand(count, 2, generator=generator, dtype=dtype) * 50
    size = torch.rand(count, 2, generator=generator, dtype=dtype) * 40
    scores = torch.rand(count, generator=generator, dtype=dtype)
    return torch.cat([near, near + size], 1), scores


@quick
@given(
    coarse_detections(),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([0, 1]),
)
def test_nms_keeps_what_the_definition_keeps(
    mmcv_ops: ModuleType,
    detections: tuple[Tensor, Tensor],
    threshold: float,
    offset: int,
) -> None:
    boxes, scores = detections
    dets, kept = mmcv_ops.nms(boxes, scores, threshold, offset)
    expected = slow_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    assert kept.tolist() == expected
    torch.testing.assert_close(dets, torch.cat([boxes, scores[:, None]], 1)[expected])


def test_nms_offset_counts_the_last_pixel(mmcv_ops: ModuleType) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3]])
    scores = torch.tensor([0.9, 0.8])
    # 12 / 16 without, 20 / 25 with the last pixel
    assert mmcv_ops.nms(boxes, scores, 0.77, offset=0)[1].tolist() == [0, 1]
    assert mmcv_ops.nms(boxes, scores, 0.77, offset=1)[1].tolist() == [0]


def test_nms_does_not_change_its_inputs(mmcv_ops: ModuleType) -> None:
    boxes, scores = random_detections(20)
    before = boxes.clone(), scores.clone()
    mmcv_ops.nms(boxes, scores, 0.5, offset=1)
    mmcv_ops.soft_nms(boxes, scores, 0.5, min_score=0.3)
    torch.testing.assert_close((boxes, scores), before, rtol=0, atol=0)


def test_nms_filters_by_score_and_number(mmcv_ops: ModuleType) -> None:
    boxes, scores = random_detections(30)
    valid = [i for i, score in enumerate(scores.tolist()) if score > 0.4]
    kept = slow_nms(boxes[valid].tolist(), scores[valid].tolist(), 0.3, 0)
    expected = [valid[i] for i in kept][:3]
    _, found = mmcv_ops.nms(boxes, scores, 0.3, score_threshold=0.4, max_num=3)
    assert found.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nms_takes_every_float_format(mmcv_ops: ModuleType, dtype: torch.dtype) -> None:
    boxes, scores = (tensor.to(dtype) for tensor in random_detections(40))
    _, kept = mmcv_ops.nms(boxes, scores, 0.5)
    doubles = boxes.double(), scores.double()
    torch.testing.assert_close(kept, mmcv_ops.nms(*doubles, 0.5)[1])


def test_nms_of_numpy_arrays_returns_numpy_arrays(mmcv_ops: ModuleType) -> None:
    boxes, scores = (tensor.numpy() for tensor in random_detections(10))
    dets, kept = mmcv_ops.nms(boxes, scores, 0.5)
    assert isinstance(dets, np.ndarray) and dets.shape == (len(kept), 5)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"type": "nms", "iou_threshold": 0.4}, id="nms"),
        pytest.param(
            {"type": "nms", "iou_threshold": 0.4, "split_thr": 2}, id="nms-split"
        ),
        pytest.param(
            {"type": "soft_nms", "iou_threshold": 0.4, "min_score": 0.05}, id="soft"
        ),
    ],
)
def test_batched_nms_is_nms_per_class(mmcv_ops: ModuleType, config: dict) -> None:
    boxes, scores = random_detections(40)
    classes = torch.arange(40) % 3
    expected = []
    for name in range(3):
        own = (classes == name).nonzero()[:, 0]
        if config["type"] == "nms":
            kept = slow_nms(boxes[own].tolist(), scores[own].tolist(), 0.4, 0)
            expected += [(float(scores[own[i]]), int(own[i])) for i in kept]
        else:
            kept, decayed = slow_soft_nms(
                boxes[own].tolist(), scores[own].tolist(), 0.4, 0.5, 0.05, "linear", 0
            )
            expected += [
                (score, int(own[i])) for i, score in zip(kept, decayed, strict=True)
            ]
    expected.sort(reverse=True)
    dets, kept = mmcv_ops.batched_nms(boxes, scores, classes, config)
    assert kept.tolist() == [index for _, index in expected]
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4].tolist(), [score for score, _ in expected])


SOFT_CASES = [
    pytest.param(method, sigma, min_score, offset, id=f"{method}-{min_score}-{offset}")
    for method, sigma in [("naive", 0.5), ("linear", 0.5), ("gaussian", 0.3)]
    for min_score in (0.0, 1e-3, 0.4, 2.0)  # 2.0 drops all but the first
    for offset in (0, 1)
]


@pytest.mark.parametrize(("method", "sigma", "min_score", "offset"), SOFT_CASES)
def test_soft_nms_follows_the_definition(
    mmcv_ops: ModuleType, method: str, sigma: float, min_score: float, offset: int
) -> None:
    boxes, scores = random_detections(30)
    arguments = (0.3, sigma, min_score, method, offset)
    dets, kept = mmcv_ops.soft_nms(boxes, scores, *arguments)
    expected, decayed = slow_soft_nms(boxes.tolist(), scores.tolist(), *arguments)
    assert kept.tolist() == expected
    torch.testing.assert_close(dets[:, :4], boxes[expected])
    torch.testing.assert_close(dets[:, 4].tolist(), decayed)


@quick
@given(
    coarse_detections(),
    st.sampled_from(["naive", "linear"]),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from([0, 1]),
)
def test_soft_nms_orders_equal_scores_as_the_definition_does(
    mmcv_ops: ModuleType,
    detections: tuple[Tensor, Tensor],
    method: str,
    min_score: float,
    offset: int,
) -> None:
    boxes, scores = detections
    arguments = (0.4, 0.5, min_score, method, offset)
    dets, kept = mmcv_ops.soft_nms(boxes, scores, *arguments)
    expected, decayed = slow_soft_nms(boxes.tolist(), scores.tolist(), *arguments)
    assert kept.tolist() == expected
    torch.testing.assert_close(dets[:, 4].tolist(), decayed)


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_of_boxes_without_area_has_no_nan(
    mmcv_ops: ModuleType, method: str
) -> None:
    boxes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1], [3, 3, 3, 5]])
    scores = torch.tensor([0.5, 0.9, 0.7])
    dets, kept = mmcv_ops.soft_nms(boxes, scores, method=method)
    assert kept.tolist() == [1, 2, 0]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.7, 0.5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_soft_nms_takes_every_float_format(
    mmcv_ops: ModuleType, dtype: torch.dtype
) -> None:
    boxes, scores = (tensor.to(dtype) for tensor in random_detections(25))
    dets, kept = mmcv_ops.soft_nms(boxes, scores, 0.3, min_score=0.05)
    doubles = boxes.double(), scores.double()
    expected, expected_kept = mmcv_ops.soft_nms(*doubles, 0.3, min_score=0.05)
    assert dets.dtype == dtype
    torch.testing.assert_close(kept, expected_kept)
    torch.testing.assert_close(dets, expected.to(dtype))


@pytest.mark.parametrize("op", ["nms", "soft_nms"])
def test_no_boxes_give_no_boxes(mmcv_ops: ModuleType, op: str) -> None:
    dets, kept = getattr(mmcv_ops, op)(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,) and kept.dtype == torch.int64


def test_kernel_writes_only_the_kept_rows() -> None:
    boxes, scores = random_detections(8)
    dets = torch.full((8, 5), -1.0, dtype=boxes.dtype)
    kept = kernels.softnms(boxes, scores, dets, 0.1, 0.5, 0.3, 0, 0)
    assert 0 < len(kept) < 8
    torch.testing.assert_close(dets[: len(kept), :4], boxes[kept])
    assert (dets[len(kept) :] == -1).all()
