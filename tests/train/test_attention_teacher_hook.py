"""AttentionTeacherHook: the same gradients as a term of the loss, in any network."""

import copy
from types import SimpleNamespace

import known_models
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from torch import nn
from torch.testing import assert_close

from mmcastling import castle, set_mask
from mmcastling.checkpoint import CheckpointError
from mmcastling.train import AttentionTeacherHook
from mmcastling.train.attention_teacher_hook import castled_attentions

NAMES = ["vit", "mmdet-swin", "timm", "mmseg-vit", "eva02"]


def runner_of(model, accumulative_counts=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return SimpleNamespace(
        model=model,
        iter=0,
        optim_wrapper=OptimWrapper(optimizer, accumulative_counts=accumulative_counts),
        message_hub=MessageHub.get_instance("attention_teacher"),
    )


@pytest.fixture
def saved(tmp_path):
    def save(model):
        torch.save(dict(state_dict=model.state_dict()), tmp_path / "softmax.pth")
        return str(tmp_path / "softmax.pth")

    return save


def started(hook, model, **options):
    runner = runner_of(model, **options)
    hook.before_train(runner)
    hook.before_train_iter(runner)
    return runner


def gradients(model, x, loss_of=lambda y: y.square().mean()):
    model.zero_grad()
    loss_of(known_models.output(model, x)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_zero_where_nothing_was_changed(name, saved):
    original = known_models.build(name)
    (size, *_) = known_models.MODELS[name][1]
    checkpoint = saved(original)
    student = castle(original, mask_threshold="4/N")
    student.train()
    set_mask(student, 1.0)
    hook = AttentionTeacherHook(checkpoint)
    started(hook, student)
    known_models.output(student, known_models.images(size))
    count = known_models.MODELS[name][2]
    assert len(hook._errors) == count == len(list(castled_attentions(student)))
    # What is castled differs, and the teacher is what it was before: on its own tokens
    # the first one gives the original's output.
    assert all(error > 0 for error in hook._errors)
    hook.after_train(None)
    hook._errors.clear()
    known_models.output(student, known_models.images(size))
    assert not hook._errors


@pytest.mark.parametrize("counts", [1, 4])
def test_gradients_are_those_of_a_term_of_the_loss(counts, saved):
    original = known_models.build("timm")
    checkpoint = saved(original)
    student = castle(copy.deepcopy(original), form="learned").train()
    student = student.double()
    set_mask(student, 1.0)
    x = known_models.images((64, 64)).double()
    inputs, outputs = [], []
    handles = [
        attention.register_forward_hook(
            lambda _, args, y: (inputs.append(args[0]), outputs.append(y))[0]
        )
        for _, attention in castled_attentions(student)
    ]
    teachers = [block.attn for block in original.double().blocks]

    def loss_of(y):
        errors = [
            (found - teacher(tokens).detach()).square().mean()
            for teacher, tokens, found in zip(teachers, inputs, outputs, strict=True)
        ]
        return y.square().mean() + 3.0 / counts * sum(errors) / len(errors)

    expected = gradients(student, x, loss_of)
    for handle in handles:
        handle.remove()
    plain = gradients(student, x)
    hook = AttentionTeacherHook(checkpoint, weight=3.0, interval=1)
    runner = started(hook, student, accumulative_counts=counts)
    runner.optim_wrapper.initialize_count_status(student, 0, 100)
    hook.before_train_iter(runner)
    found = gradients(student, x)
    assert_close(found, expected, atol=1e-7, rtol=1e-4)
    name = "blocks.0.attn.qkv.weight"
    assert (found[name] - plain[name]).norm() > 0.01 * plain[name].norm()
    hook.after_train_iter(runner)
    error = runner.message_hub.get_scalar("train/attention_error").current()
    assert error == pytest.approx(sum(map(float, hook._errors)) / 2)


def test_nothing_is_added_in_evaluation_and_without_gradients(saved):
    original = known_models.build("timm")
    checkpoint = saved(original)
    student = castle(original)
    x = known_models.images((64, 64))
    set_mask(student, 1.0)
    hook = AttentionTeacherHook(checkpoint)
    started(hook, student)
    student.eval()(x)
    with torch.no_grad():
        student.train()(x)
    assert not hook._errors


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(weight=0.0), "weight=0.0"), (dict(interval=0), "interval=0")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionTeacherHook("softmax.pth", **options)


def test_a_model_or_a_checkpoint_that_does_not_fit(saved):
    original = known_models.build("timm")
    checkpoint = saved(original)
    with pytest.raises(ValueError, match="no castled attention"):
        started(AttentionTeacherHook(checkpoint), original)
    student = castle(original)
    other = saved(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"lacks blocks\.0\.attn"):
        started(AttentionTeacherHook(other), student)
