"""MaskDecayHook: the schedule as a pure function, and inside a real Runner."""

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from mmcastling.attention import (
    Attention,
    MaskThreshold,
    naive_masked_softmax_attention,
)
from mmcastling.train import MaskDecayHook
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

# -- the schedule ----------------------------------------------------------------------


@pytest.mark.parametrize("curve", ["linear", "cosine", "exp"])
@pytest.mark.parametrize("mode", ["threshold", "weight"])
def test_schedule_starts_at_start_ends_off_and_is_monotonic(mode, curve):
    hook = MaskDecayHook(mode=mode, begin=0.2, finish=0.6, curve=curve)
    states = [hook.state_at(i / 100) for i in range(101)]
    assert states[0] == states[20] == (MaskThreshold(0.02), 1.0)
    thresholds = [threshold.probability for threshold, _ in states]
    weights = [weight for _, weight in states]
    assert thresholds == sorted(thresholds)
    assert weights == sorted(weights, reverse=True)
    on = [not t.rejects_all and w > 0 for t, w in states]
    assert all(on[:60]) and not any(on[60:])
    assert thresholds[-1] == (1.0 if mode == "threshold" else 0.02)


def test_mode_none_is_the_released_fixed_threshold():
    hook = MaskDecayHook(mode="none")
    assert {hook.state_at(i / 10) for i in range(11)} == {(MaskThreshold(0.02), 1.0)}


def test_curves_at_half_way():
    def half(**options):
        threshold, weight = MaskDecayHook(
            start=0.0, begin=0.0, finish=1.0, **options
        ).state_at(0.5)
        return weight if options["mode"] == "weight" else threshold.probability

    assert half(mode="threshold", curve="linear") == pytest.approx(0.5)
    assert half(mode="weight", curve="cosine") == pytest.approx(0.5)
    # (sqrt(r) - r) / (1 - r) with r = exp(-7): near the small end for both modes.
    assert half(mode="threshold", curve="exp") == pytest.approx(0.0293, abs=1e-4)
    assert half(mode="weight", curve="exp") == pytest.approx(0.0293, abs=1e-4)


@given(st.floats(0, 1), st.floats(0, 1))
def test_state_depends_on_progress_alone(first, second):
    used, fresh = MaskDecayHook(start="4/N"), MaskDecayHook(start="4/N")
    used.state_at(first)
    assert used.state_at(second) == fresh.state_at(second)


def test_thresholds_in_units_of_uniform_attention_rise_to_a_probability():
    threshold, _ = MaskDecayHook(start="4/N", curve="linear", finish=1.0).state_at(0.5)
    assert (threshold.probability, threshold.multiple) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="fade"), "'fade' is not known"),
        (dict(curve="step"), "'step' is not known"),
        (dict(begin=0.8, finish=0.2), r"begin=0\.8 is after finish=0\.2"),
        (dict(finish=1.5), r"finish=1\.5 is not a fraction"),
        (dict(start=1.5), r"1\.5 is outside \[0, 1\]"),
        (dict(end=-0.1), r"-0\.1 is outside \[0, 1\]"),
        (dict(start="4/M"), "'4/M' is not understood"),
        (dict(interval=0), "interval=0"),
        (dict(mask_penalty=-0.1), r"mask_penalty=-0\.1 must be a finite number"),
        (dict(mask_penalty=math.inf), "mask_penalty=inf must be a finite number"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskDecayHook(**options)


# -- inside a Runner -------------------------------------------------------------------


class Toy(BaseModel):
    """Two castling attentions on random tokens; notes the masks of every forward."""

    def __init__(self, deploy=False):
        super().__init__()
        self.first = Attention(8, 2, deploy=deploy)
        self.second = Attention(8, 2, deploy=deploy)
        self.seen = []

    def forward(self, inputs, mode="tensor"):
        if mask := self.first.mixer.branch:
            self.seen.append((mode, mask.threshold, mask.weight))
        x = self.second(self.first(inputs))
        return {"loss": x.square().mean()} if mode == "loss" else [x.mean()]


class Nothing(BaseMetric):
    """A metric that asks for nothing."""

    def process(self, data_batch, data_samples):
        self.results.append(0.0)

    def compute_metrics(self, results):
        return {"nothing": 0.0}


def run(
    tmp_path,
    model=None,
    max_iters=8,
    resume=False,
    val=None,
    epochs=None,
    optim_wrapper=None,
    hooks=(),
    **hook,
):
    data = [{"inputs": torch.randn(6, 8)} for _ in range(4)]
    loop = dict(by_epoch=False, max_iters=max_iters, val_interval=val or 10**6)
    if epochs is not None:
        loop = dict(by_epoch=True, max_epochs=epochs)
    run.count = getattr(run, "count", 0) + 1
    options = dict(type="MaskDecayHook", interval=1, **hook)
    runner = Runner(
        model=model or Toy(),
        work_dir=str(tmp_path),
        train_dataloader=DataLoader(data, batch_size=1),
        train_cfg=loop,
        val_dataloader=DataLoader(data, batch_size=1) if val else None,
        val_cfg=dict() if val else None,
        val_evaluator=Evaluator(Nothing()) if val else None,
        optim_wrapper=optim_wrapper
        if isinstance(optim_wrapper, OptimWrapperDict)
        else dict(optimizer=dict(type="SGD", lr=1e-3), **(optim_wrapper or {})),
        custom_hooks=[options, *hooks],
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4),
            logger=dict(type="LoggerHook", interval=1),
        ),
        log_processor=dict(by_epoch=epochs is not None),
        visualizer=dict(
            type="Visualizer",
            vis_backends=[dict(type="LocalVisBackend")],
            name=f"mask_decay_{run.count}",
        ),
        resume=resume,
        experiment_name=f"mask_decay_{run.count}",
        randomness=dict(seed=0),
    )
    runner.train()
    return runner


def load(path):
    return torch.load(path, weights_only=False)


def test_reached_from_the_root_registry():
    assert HOOKS.get("MaskDecayHook") is MaskDecayHook
    assert HOOKS.get("mmcastling.MaskDecayHook") is MaskDecayHook


@pytest.mark.parametrize("epochs", [None, 2], ids=["by_iter", "by_epoch"])
def test_masks_follow_the_schedule_iteration_by_iteration(tmp_path, epochs):
    model = Toy()
    run(tmp_path, model, max_iters=8, epochs=epochs, finish=0.5, curve="linear")
    hook = MaskDecayHook(finish=0.5, curve="linear")
    expected = [("loss", *hook.state_at(i / 7)) for i in range(8)]
    assert model.seen == expected
    assert not any(module.mask_is_on for _, module in castling_modules(model))


def test_an_attention_that_offers_set_mask_alone_follows_too(tmp_path):
    class Foreign(nn.Identity):
        def set_mask(self, threshold, weight=1.0, penalty=0.0):
            self.threshold = MaskThreshold.parse(threshold)

    model = Toy()
    model.third = Foreign()
    run(tmp_path, model, val=6, mode="none")  # validates at the end
    assert model.third.threshold == model.first.mixer.branch.threshold
    assert model.third.threshold == MaskThreshold(0.02)


def test_resume_continues_the_schedule_of_an_uninterrupted_run(tmp_path):
    whole = Toy()
    run(tmp_path / "whole", whole, max_iters=8, finish=1.0)
    parted = tmp_path / "parted"
    run(parted, max_iters=8, finish=1.0)
    (parted / "last_checkpoint").write_text(str(parted / "iter_4.pth"))
    resumed = Toy()
    run(parted, resumed, max_iters=8, finish=1.0, resume=True)
    assert resumed.seen == whole.seen[4:]


def test_validation_sees_the_deployed_graph_and_training_goes_on(tmp_path):
    model = Toy()
    run(tmp_path, model, max_iters=4, val=2, finish=1.0, curve="linear")
    validated = {state[1:] for state in model.seen if state[0] == "predict"} | {
        state[1:] for state in model.seen if state[0] == "tensor"
    }
    assert validated == {(MaskThreshold(1.0), 1.0)}
    trained = [t.probability for mode, t, _ in model.seen if mode == "loss"]
    assert trained == pytest.approx([0.02, 0.02 + 0.98 / 3, 0.02 + 0.98 * 2 / 3, 1.0])


def test_validation_can_keep_the_branch(tmp_path):
    model = Toy()
    run(tmp_path, model, max_iters=2, val=1, mode="none", val_deployed=False)
    assert {t.probability for _, t, _ in model.seen} == {0.02}


class Fails(Nothing):
    def process(self, data_batch, data_samples):
        raise RuntimeError("out of memory")


def test_masks_are_back_after_a_validation_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(Nothing, "process", Fails.process)
    model = Toy()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, model, max_iters=4, val=2, mode="none", start="4/N")
    assert {str(m.branch.threshold) for _, m in castling_modules(model)} == {"4/N"}


def test_what_is_saved_after_a_validation_has_the_masks_of_training(tmp_path):
    saved = []

    class Saves(Hook):
        priority = "VERY_LOW"  # as CheckpointHook, which saves the best one then

        def after_val_epoch(self, runner, metrics=None):
            saved.append(runner.model.state_dict()._metadata["first.mixer"])

    run(tmp_path, max_iters=2, val=1, mode="none", hooks=[Saves()])
    assert [record["castling_mask"]["threshold"] for record in saved] == ["0.02"] * 2


@pytest.mark.parametrize("source", ["mmengine", "mmpretrain"])
def test_averaged_copies_follow(source, tmp_path):
    from mmengine.hooks import EMAHook
    from mmpretrain.engine.hooks import EMAHook as MMPretrainEMAHook

    hook = EMAHook() if source == "mmengine" else MMPretrainEMAHook()
    run(tmp_path, max_iters=6, val=3, start="1/N", finish=0.5, hooks=[hook])
    copied = [module for _, module in castling_modules(hook.ema_model)]
    assert len(copied) == 2 and not any(module.mask_is_on for module in copied)
    averaged = load(tmp_path / "iter_6.pth")["ema_state_dict"]
    assert averaged._metadata["module.first.mixer"]["castling_mask"] == {
        "threshold": "1",
        "weight": 1.0,
    }


@pytest.mark.parametrize("counts", [3, 5])
def test_a_penalty_ends_with_its_accumulation(counts, tmp_path):
    accumulated = dict(accumulative_counts=counts)
    runner = run(tmp_path, max_iters=12, optim_wrapper=accumulated, mask_penalty=0.1)
    assert (tmp_path / "iter_12.pth").is_file()
    assert {m.branch.penalty for _, m in castling_modules(runner.model)} == {0.0}


def resumed_log(tmp_path, max_iters, **hook):
    run(tmp_path, max_iters=4, **hook)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_4.pth"))
    run(tmp_path, max_iters=max_iters, resume=True, **hook)
    *_, log = sorted(tmp_path.glob("*/*.log"))
    return log.read_text()


def test_masks_that_come_back_in_a_longer_training_are_said(tmp_path):
    log = resumed_log(tmp_path, 12, start="1/N", finish=0.5, curve="linear")
    assert "was saved at 100.0% of its training" in log
    assert "max_iters=12 that is 36.4%" in log
    assert "go back to threshold 0.727273+" in log.replace(
        "0.7272727272727273", "0.727273"
    )


@pytest.mark.parametrize("options", [dict(mode="none"), dict(finish=0.1)])
def test_masks_that_do_not_change_are_not(options, tmp_path):
    assert "was saved at" not in resumed_log(tmp_path, 8, **options)


class TwoOptimizers(Toy):
    """As a model that steps its parts by itself, for which OptimWrapperDict is."""

    def train_step(self, data, optim_wrapper):
        loss = self(**self.data_preprocessor(data, True), mode="loss")["loss"]
        optim_wrapper["first"].update_params(loss)
        optim_wrapper["second"].zero_grad()
        return {"loss": loss.detach()}

    def wrappers(self, second_counts=1):
        return OptimWrapperDict(
            first=OptimWrapper(torch.optim.SGD(self.first.parameters(), 1e-3)),
            second=OptimWrapper(
                torch.optim.SGD(self.second.parameters(), 1e-3),
                accumulative_counts=second_counts,
            ),
        )


def test_a_penalty_acts_with_several_optimizers(tmp_path):
    weights = []
    for penalty in (0.0, 50.0):
        torch.manual_seed(0)
        model = TwoOptimizers()
        wrappers, where = model.wrappers(), tmp_path / str(penalty)
        run(where, model, max_iters=3, optim_wrapper=wrappers, mask_penalty=penalty)
        weights.append(model.first.qkv.weight.detach())
    assert (weights[0] - weights[1]).abs().max() > 1e-4


def test_a_penalty_beside_losses_scaled_apart_is_refused(tmp_path):
    model = TwoOptimizers()
    with pytest.raises(
        ValueError, match=r"mask_penalty=0.1 follows .*'second': 2.*leave it out"
    ):
        run(tmp_path, model, optim_wrapper=model.wrappers(2), mask_penalty=0.1)
    run(tmp_path, model, max_iters=1, optim_wrapper=model.wrappers(2))


class Penalised(Toy):
    """One castling attention, and a penalty that is written into the loss."""

    def __init__(self, penalty):
        super().__init__()
        self.second = nn.Identity()
        self.penalty = penalty

    def forward(self, inputs, mode="tensor"):
        result = super().forward(inputs, mode)
        if mode == "loss":
            qkv = self.first.qkv(inputs).reshape(len(inputs), -1, 3, 2, 4)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            rows = naive_masked_softmax_attention(
                q, k, torch.ones_like(v), threshold=self.first.mixer.branch.threshold
            )
            result["penalty"] = self.penalty * rows[..., 0].sum()
            result["loss"] = result["loss"] + result["penalty"]
        return result


@pytest.mark.parametrize("counts", [1, 2], ids=["plain", "accumulated"])
def test_penalty_trains_as_a_term_of_the_loss_does(tmp_path, counts):
    def weights(penalty_in_loss, **hook):
        torch.manual_seed(0)
        model = Penalised(penalty_in_loss)
        run(
            tmp_path / str(penalty_in_loss) / str(bool(hook)),
            model,
            max_iters=5,
            optim_wrapper=dict(accumulative_counts=counts),
            start=0.1,
            **hook,
        )
        return model.first.qkv.weight.detach()

    by_hook, in_loss = weights(0.0, mask_penalty=5.0), weights(5.0)
    assert_close(by_hook, in_loss)
    assert (by_hook - weights(0.0)).abs().max() > 1e-4


def test_penalty_follows_the_loss_scale_of_mixed_precision():
    class Wrapper(OptimWrapper):
        loss_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = SimpleNamespace(
        model=model,
        hooks=[],
        iter=0,
        max_iters=9,
        optim_wrapper=Wrapper(optimizer, accumulative_counts=4),
    )
    MaskDecayHook(mask_penalty=0.5).before_train_iter(runner, 0)
    masks = [module.branch for _, module in castling_modules(model)]
    assert [mask.penalty for mask in masks] == [0.5 * 8 / 4] * 2


def test_state_is_logged_to_every_backend(tmp_path):
    runner = run(tmp_path, max_iters=4, start="0.5/N", finish=0.6, curve="linear")
    (scalars,) = tmp_path.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [line["mask_threshold"] for line in lines] == pytest.approx(
        [0.0, (1 / 3) / 0.6, 1.0, 1.0]
    )
    assert lines[0]["mask_threshold_uniform"] == 0.5
    densities = [line["mask_density"] for line in lines]
    assert densities[0] > 0.0 and densities[-1] == 0.0
    first = lines[0]
    assert first["mask_density"] == pytest.approx(
        (first["mask_density_early"] + first["mask_density_middle"]) / 2
    )
    assert runner.message_hub.get_scalar("train/mask_weight").current() == 1.0


def test_checkpoints_carry_the_state_and_loading_restores_it(tmp_path):
    run(tmp_path, max_iters=8, finish=1.0, curve="linear")
    state = load(tmp_path / "iter_4.pth")["meta"]["mask_decay"]
    assert float(state["threshold"]) == 0.02 + (1 - 0.02) * (3 / 7)
    assert state["weight"] == 1.0
    model = Toy()
    hook = MaskDecayHook()
    runner = type("R", (), {"model": model})
    hook.after_load_checkpoint(runner, load(tmp_path / "iter_4.pth"))
    assert model.first.mixer.branch.threshold.probability == pytest.approx(0.44)
    hook.after_load_checkpoint(runner, load(tmp_path / "iter_8.pth"))
    assert not model.first.mixer.mask_is_on


def test_a_branch_left_on_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        runner = run(tmp_path, max_iters=2, mode="none")
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert "auxiliary softmax branch still on" in log
    assert runner.iter == 2


def test_no_warning_once_the_masks_are_zero(tmp_path):
    run(tmp_path, max_iters=4)
    assert "still on" not in next(tmp_path.glob("*/*.log")).read_text()


@pytest.mark.parametrize("kind", ["deployed", "not_castled"])
def test_a_model_without_a_branch_is_an_error(tmp_path, kind):
    model = Toy(deploy=True)
    if kind == "not_castled":
        model.first, model.second = nn.Linear(8, 8), nn.Identity()
    with pytest.raises(ValueError, match="found no castling attention"):
        run(tmp_path, model, max_iters=1)


# -- the verbs -------------------------------------------------------------------------


def test_verbs_on_a_model():
    model = Toy()
    names = [name for name, _ in castling_modules(model)]
    assert names == ["first.mixer", "second.mixer"]
    assert set_mask(model, "4/N", 0.5) == 2
    assert str(model.second.mixer.branch.threshold) == "4/N"
    copied = switch_to_deploy(model)
    assert copied is not model and len(list(castling_modules(model))) == 2
    assert switch_to_deploy(model, inplace=True) is model
    assert list(castling_modules(model)) == []
    with pytest.raises(ValueError, match="Toy has no castling attention"):
        set_mask(model, 0.5)
