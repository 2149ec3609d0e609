"""Forward passes: timed in turns, and split so that every part gets its own."""

import time

import pytest
import torch
from torch import nn

from mmcastling.analysis import PARTS, PartTimer, paired_medians, paired_seconds

STEP = 0.02


def spend(steps):
    time.sleep(STEP * steps)


class Part(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, x):
        spend(self.steps)
        return x


class Head(Part):
    """Has a forward pass, and a post-processing that looks into the features again."""

    def __init__(self, steps, post_steps, again=None):
        super().__init__(steps)
        self.post_steps = post_steps
        self.again = again

    def predict(self, x):
        return self.predict_by_feat(self(x), x)

    def predict_by_feat(self, scores, x):
        spend(self.post_steps)
        if self.again is not None:
            self.again[0](x)
        return scores


class Detector(nn.Module):
    def __init__(self, again=False):
        super().__init__()
        self.backbone = Part(4)
        self.neck = Part(2)
        self.rpn_head = Head(1, 1)
        # In a list, so that it is not registered twice.
        self.roi_head = Head(1, 3, again=[self.neck] if again else None)
        self.fails = False

    def forward(self, x):
        x = self.neck(self.backbone(x))
        if self.fails:
            raise RuntimeError("lost")
        self.roi_head.predict(self.rpn_head.predict(x))
        spend(1)
        return x


def steps(timer):
    return {part: seconds / STEP for part, seconds in timer.parts.items()}


def nearly(**expected):
    return pytest.approx(expected, abs=0.9)


def test_each_part_gets_its_time_and_heads_the_rest():
    model = Detector()
    with PartTimer(model) as timer:
        for _ in range(3):
            model(torch.zeros(1))
    assert tuple(timer.parts) == PARTS
    expected = {"backbone": 4, "neck": 2, "heads": 3, "post-processing": 4}
    assert steps(timer) == nearly(**expected)
    assert len(timer.seconds) == 3
    for seconds, parts in zip(timer.seconds, timer.passes, strict=True):
        assert seconds == pytest.approx(sum(parts.values()))
        assert seconds > 13 * STEP


def test_nested_calls_count_once_to_the_innermost():
    model = Detector(again=True)
    with PartTimer(model) as timer:
        model(torch.zeros(1))
    # The neck runs twice, the second time inside the post-processing.
    expected = {"backbone": 4, "neck": 4, "heads": 3, "post-processing": 4}
    assert steps(timer) == nearly(**expected)


def test_a_pass_that_failed_does_not_bend_the_next():
    model = Detector()
    with PartTimer(model) as timer:
        model.fails = True
        with pytest.raises(RuntimeError, match="lost"):
            model(torch.zeros(1))
        model.fails = False
        model.backbone(torch.zeros(1))  # outside of any pass
        model(torch.zeros(1))
    expected = {"backbone": 4, "neck": 2, "heads": 3, "post-processing": 4}
    assert steps(timer) == nearly(**expected)
    assert len(timer.passes) == 1


def test_nothing_is_left_on_the_model():
    model = Detector()
    model.roi_head.predict_by_feat = own = lambda scores, x: scores
    with PartTimer(model):
        assert model.roi_head.predict_by_feat is not own
        model(torch.zeros(1))
    assert model.roi_head.predict_by_feat is own
    assert "predict_by_feat" not in vars(model.rpn_head)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_compiled_backbone_is_timed_from_outside():
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    model = Detector()
    model.backbone = nn.Linear(1, 1)
    model.backbone.compile(backend=backend)
    compiled = model.backbone._compiled_call_impl
    with torch.no_grad(), PartTimer(model) as timer:
        model(torch.zeros(1, 1))
        model(torch.zeros(1, 1))
    assert len(traced) == 1
    assert timer.passes[1]["backbone"] > 0
    assert model.backbone._compiled_call_impl is compiled


def test_a_model_without_a_backbone_is_timed_as_a_whole():
    model = Part(1)
    with PartTimer(model) as timer:
        model(torch.zeros(1))
    assert timer.parts == {}
    assert timer.median >= STEP


def test_without_a_pass_there_is_nothing_to_split():
    with pytest.raises(ValueError, match="no forward pass was timed"):
        _ = PartTimer(Detector()).parts


def test_contenders_take_turns_and_the_order_is_reversed():
    calls = []
    passes = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = paired_seconds(passes, repeats=2)
    assert "".join(calls) == "abc" + "abc" + "cba"  # the first round is not timed
    assert {name: len(values) for name, values in seconds.items()} == dict(
        a=2, b=2, c=2
    )
    assert set(paired_medians(passes, 1)) == {"a", "b", "c"}
