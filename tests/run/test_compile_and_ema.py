"""torch.compile by config, and averaged weights from training to deployment."""

import pickle

import pytest
import torch
from mmengine.hooks import Hook
from torch.testing import assert_close

from mmcastling.checkpoint import CheckpointError, load_checkpoint
from mmcastling.deploy import is_deployed
from mmcastling.run import convert, evaluate, load_config, train
from mmcastling.run.testing import enable_output

pytestmark = pytest.mark.slow

MOMENTUM = 0.3


class RawWeights(Hook):
    """Keeps the model's own weights after every iteration."""

    priority = "VERY_HIGH"

    def __init__(self):
        self.states = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        state = runner.model.state_dict().items()
        self.states.append({name: value.clone() for name, value in state})


def config(classifier_config, work_dir, **options):
    cfg = load_config(classifier_config, work_dir=str(work_dir))
    cfg.randomness = dict(seed=2)
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)
    cfg.update(options)
    return cfg


# -- averaged weights ------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(classifier_config, tmp_path_factory):
    """A finished run with EMAHook, and the raw weights of each of its iterations."""
    work_dir = tmp_path_factory.mktemp("averaged")
    raw = RawWeights()
    cfg = config(classifier_config, work_dir)
    cfg.custom_hooks = [
        dict(type="MaskDecayHook", start="1/N", finish=0.5),
        dict(type="EMAHook", momentum=MOMENTUM),
    ]
    with pytest.MonkeyPatch.context() as patch:
        # A hook that is an object has no place in a config that is written down.
        build = train.__globals__["build_runner"]

        def with_raw(cfg):
            runner = build(cfg)
            runner.register_hook(raw)
            return runner

        patch.setitem(train.__globals__, "build_runner", with_raw)
        train(cfg)
    return cfg, work_dir / "epoch_2.pth", raw.states


def expected_average(states):
    """MMEngine's exponential average, whose first step copies."""
    average = dict(states[0])
    for state in states[1:]:
        average = {
            name: (1 - MOMENTUM) * value + MOMENTUM * state[name]
            for name, value in average.items()
        }
    return average


def test_a_checkpoint_holds_the_average_and_beside_it_the_raw_weights(averaged):
    _, path, states = averaged
    checkpoint = load_checkpoint(path)
    average = expected_average(states)
    assert len(states) == 4
    assert_close(dict(checkpoint["state_dict"]), average, atol=1e-6, rtol=1e-5)
    raw = checkpoint["ema_state_dict"]
    assert_close({n: raw[f"module.{n}"] for n in average}, states[-1], atol=0, rtol=0)


@pytest.mark.parametrize("ema", [None, True, False])
def test_the_weights_that_were_asked_for_are_deployed(ema, averaged, tmp_path):
    cfg, path, states = averaged
    out = tmp_path / "out.pth"
    report = convert(cfg, path, out, ema=ema)
    assert report.difference < 1e-4 and report.images == 4
    deployed = load_checkpoint(out)
    expected = states[-1] if ema is False else expected_average(states)
    other = expected_average(states) if ema is False else states[-1]
    assert is_deployed(deployed)
    assert_close(dict(deployed["state_dict"]), expected, atol=1e-6, rtol=1e-5)
    name = "backbone.layers.0.attn.qkv.weight"
    assert (deployed["state_dict"][name] - other[name]).abs().max() > 1e-5


def test_evaluation_is_of_the_average(averaged, tmp_path):
    cfg, path, _ = averaged
    scores = {}
    for name, ema in (("average", True), ("raw", False)):
        out = tmp_path / f"{name}.pth"
        convert(cfg, path, out, ema=ema)
        scores[name] = scores_of(out.with_suffix(".py"), out, tmp_path)
    evaluated = scores_of(cfg.filename, path, tmp_path)
    assert_close(evaluated, scores["average"], atol=0, rtol=0)
    assert (evaluated - scores["raw"]).abs().max() > 1e-5


def scores_of(config, source, folder):
    cfg = load_config(config, work_dir=str(folder))
    enable_output(cfg, str(folder / "scores.pkl"))
    evaluate(cfg, source)
    predictions = pickle.loads((folder / "scores.pkl").read_bytes())
    return torch.stack([prediction["pred_score"] for prediction in predictions])


def test_averages_that_are_not_there_cannot_be_demanded(averaged, tmp_path):
    cfg, path, _ = averaged
    checkpoint = load_checkpoint(path)
    del checkpoint["ema_state_dict"]
    torch.save(checkpoint, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="has no averaged weights: train with"):
        convert(cfg, tmp_path / "plain.pth", tmp_path / "out.pth", ema=True)
    assert not (tmp_path / "out.pth").exists()


# -- torch.compile ---------------------------------------------------------------------


def finished(classifier_config, work_dir, **options):
    """A small model, so that compiling it takes seconds, after three iterations."""
    cfg = config(classifier_config, work_dir, **options)
    sizes = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
    cfg.model.backbone.arch, cfg.model.head.in_channels = sizes, 16
    # AdamW would blow up the rounding of gradients that are almost zero.
    cfg.optim_wrapper.optimizer = dict(type="SGD", lr=0.1, weight_decay=0.05)
    cfg.train_cfg = dict(by_epoch=False, max_iters=3)
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = dict(
        type="CheckpointHook", by_epoch=False, interval=3
    )
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.custom_hooks = [
        dict(type="MaskDecayHook", start="1/N", begin=0.3, finish=0.9, interval=1),
        dict(type="EMAHook", momentum=0.5),
    ]
    torch.compiler.reset()
    train(cfg)
    return cfg, load_checkpoint(work_dir / "iter_3.pth")


@pytest.fixture(scope="module")
def plain(classifier_config, tmp_path_factory):
    return finished(classifier_config, tmp_path_factory.mktemp("plain"))[1]


@pytest.mark.long
def test_compiled_training_is_the_same_training(plain, classifier_config, tmp_path):
    options = dict(compile=dict(backend="aot_eager"))
    cfg, compiled = finished(classifier_config, tmp_path, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for key in ("state_dict", "ema_state_dict"):
        assert list(compiled[key]) == list(plain[key])
        assert_close(dict(compiled[key]), dict(plain[key]), atol=1e-5, rtol=1e-4)
    assert compiled["meta"]["mask_decay"] == plain["meta"]["mask_decay"]
    densities = [
        run["message_hub"]["log_scalars"]["train/mask_density"].data[0]
        for run in (compiled, plain)
    ]
    assert_close(densities[0], densities[1], atol=1e-3, rtol=0)
    assert densities[0][0] > 0 and densities[0][-1] == 0

    out = tmp_path / "deployed.pth"
    report = convert(cfg, tmp_path / "iter_3.pth", out, ema=True)
    assert report.difference == 0
    assert evaluate(load_config(out.with_suffix(".py")), out).pruning is None
