"""Evaluation: what is pruned and said, and that at masks zero it changes nothing."""

import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS
from torch.testing import assert_close

from mmcastling.analysis import PARTS, count_macs
from mmcastling.checkpoint import CheckpointError, load_checkpoint, load_weights
from mmcastling.deploy import largest_difference
from mmcastling.models import CastlingViT
from mmcastling.run import ConfigError, convert, evaluate, load_config
from mmcastling.run.config import datasets_of
from mmcastling.run.load import backbone_macs
from mmcastling.run.runner import build_runner
from mmcastling.run.testing import enable_drawing, enable_output, enable_tta
from mmcastling.verbs import (
    castling_modules,
    restore_mask,
    set_mask,
    switch_to_deploy,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def predict(tmp_path_factory):
    """Evaluate and return the result and all predictions, once per question."""
    known = {}

    def run(config, checkpoint, deploy=True, tta=False, mirrored=False):
        question = (config, checkpoint, deploy, tta, mirrored)
        if question not in known:
            folder = tmp_path_factory.mktemp("evaluation")
            cfg = load_config(config, work_dir=str(folder))
            if tta:
                enable_tta(cfg)
            if mirrored:
                mirror = dict(type="RandomFlip", prob=1.0, direction="horizontal")
                cfg.test_dataloader.dataset.pipeline.insert(-1, mirror)
            enable_output(cfg, str(folder / "out.pkl"))
            result = evaluate(cfg, checkpoint, deploy=deploy)
            known[question] = result, pickle.loads((folder / "out.pkl").read_bytes())
        return known[question]

    return run


@pytest.fixture(scope="module")
def deployed(trained, tmp_path_factory):
    """The converted detector: its checkpoint and the config beside it."""
    out = tmp_path_factory.mktemp("deployed") / "detector.pth"
    convert(load_config(trained.config), trained.masks_off, out)
    return out.with_suffix(".py"), out


def boxes(predictions):
    return [
        (item["pred_instances"]["bboxes"], item["pred_instances"]["scores"])
        for item in predictions
    ]


def scores(predictions):
    return [item["pred_score"] for item in predictions]


# -- pruning ---------------------------------------------------------------------------


def test_at_masks_zero_the_train_graph_and_the_deployed_one_agree(trained, predict):
    graph, expected = predict(trained.config, trained.masks_off, deploy=False)
    pruned, predictions = predict(trained.config, trained.masks_off)
    assert set(pruned.metrics) == {
        f"coco/{kind}_{name}" for kind in ("bbox", "segm") for name in ("mAP", "AR@100")
    }
    assert pruned.metrics == pytest.approx(graph.metrics, abs=1e-3)
    assert len(predictions) == 4 and len(predictions[0]["pred_instances"]["scores"]) > 9
    assert_close(boxes(predictions), boxes(expected), rtol=1e-4, atol=1e-3)
    assert graph.pruning is None
    assert pruned.pruning.attentions == 2 and not pruned.pruning.was_on
    assert pruned.pruning.difference < 1e-5 < pruned.pruning.magnitude
    assert pruned.pruning.images == 4
    assert pruned.seconds_per_image > 0
    assert tuple(pruned.parts) == PARTS and min(pruned.parts.values()) > 0
    assert sum(pruned.parts.values()) == pytest.approx(
        pruned.seconds_per_image, rel=0.5
    )


def test_with_masks_on_pruning_changes_predictions_and_says_so(trained, predict, capfd):
    _, expected = predict(trained.config, trained.masks_on, deploy=False)
    pruned, predictions = predict(trained.config, trained.masks_on)
    assert pruned.pruning.was_on
    assert pruned.pruning.difference > 1e-3
    said = capfd.readouterr().out
    assert str(pruned.pruning) in said
    assert "masks of this checkpoint have not decayed" in said
    with pytest.raises(AssertionError):
        assert_close(boxes(predictions), boxes(expected), rtol=1e-4, atol=1e-3)


def test_a_deployed_checkpoint_gives_the_same_with_either_config(
    trained, deployed, predict
):
    expected, predictions = predict(trained.config, trained.masks_off)
    for config in (deployed[0], trained.config):
        for deploy in (True, False):
            result, again = predict(config, deployed[1], deploy=deploy)
            assert result.pruning is None
            assert result.metrics == pytest.approx(expected.metrics, abs=1e-3)
            assert_close(boxes(again), boxes(predictions), rtol=1e-4, atol=1e-3)


def test_the_classifier_is_pruned_the_same_way(trained_classifier, predict):
    config, checkpoint = trained_classifier.config, trained_classifier.masks_off
    graph, expected = predict(config, checkpoint, deploy=False)
    pruned, predictions = predict(config, checkpoint)
    assert pruned.metrics == graph.metrics
    assert pruned.metrics["accuracy/top1"] >= 50.0
    assert_close(scores(predictions), scores(expected))
    assert pruned.pruning.images == 4
    assert pruned.parts["backbone"] > pruned.parts["heads"] > 0
    assert pruned.parts["neck"] == 0 < pruned.parts["post-processing"]
    _, with_branch = predict(config, trained_classifier.masks_on, deploy=False)
    _, without = predict(config, trained_classifier.masks_on)
    assert (scores(with_branch)[0] - scores(without)[0]).abs().max() > 1e-7


def test_a_network_without_castling_has_nothing_to_prune(
    classifier_config, tmp_path, capfd
):
    attention = {"model.backbone.attention": {"_delete_": True, "type": "softmax"}}
    cfg = load_config(classifier_config, attention, work_dir=str(tmp_path))
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, tmp_path / "s.pth")
    assert evaluate(cfg, tmp_path / "s.pth").pruning is None
    assert "pruned nothing: nothing is castled" in capfd.readouterr().out


def test_the_difference_is_that_of_the_first_images(trained_classifier, tmp_path):
    config, checkpoint = trained_classifier.config, trained_classifier.masks_on
    cfg = load_config(config, work_dir=str(tmp_path))
    said = evaluate(cfg, checkpoint).pruning
    runner = build_runner(load_config(config, work_dir=str(tmp_path)))
    model = runner.model
    load_weights(model, load_checkpoint(checkpoint), "it")
    restore_mask(model, load_checkpoint(checkpoint))
    batch = next(iter(runner.test_dataloader))
    images = model.eval().data_preprocessor(batch)["inputs"]
    expected = largest_difference(model, switch_to_deploy(model), [images])
    assert (said.difference, said.magnitude) == pytest.approx(expected, rel=1e-4)
    assert said.difference > 0


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32)])
def test_saved_macs_are_those_of_the_softmax_branch(height, width):
    options = dict(arch="nano", img_size=32, patch_size=8, with_cls_token=False)
    backbone = CastlingViT(out_type="featmap", **options).eval()
    set_mask(backbone, 1.0)
    image = torch.randn(1, 3, height, width)
    before = [parameter.clone() for parameter in backbone.parameters()]

    on = backbone_macs(backbone, (height, width), branch_on=True)
    tokens = height * width // 64
    # q k^T and P v, of 128 channels in four layers.
    saved = 4 * 2 * tokens * tokens * 128
    deployed = switch_to_deploy(backbone)
    assert on - count_macs(deployed, image).macs == saved
    real = copy.deepcopy(backbone)
    set_mask(real, 0.0)
    assert on == count_macs(real, image).macs
    # Nothing of it stays in the model.
    assert all(module.branch.threshold.rejects_all for _, module in castling(backbone))
    assert_close(list(backbone.parameters()), before)


def castling(model):
    return list(castling_modules(model))


def test_a_checkpoint_that_does_not_fit_is_not_evaluated(
    trained, trained_classifier, tmp_path
):
    cfg = load_config(trained.config, work_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        evaluate(cfg, trained_classifier.masks_off)
    assert trained_classifier.masks_off.name in str(caught.value)


def test_a_config_without_a_test_set_says_so(trained, tmp_path):
    cfg = load_config(trained.config, {"test_dataloader": None})
    with pytest.raises(ConfigError, match="lacks test_dataloader"):
        evaluate(cfg, trained.masks_off)


# -- options ---------------------------------------------------------------------------


def test_augmented_detection_merges_boxes_of_both_views(trained, predict):
    _, one_view = predict(trained.config, trained.masks_off)
    result, merged = predict(trained.config, trained.masks_off, tta=True)
    assert set(result.metrics) == {"coco/bbox_mAP", "coco/bbox_AR@100"}
    assert result.pruning.attentions == 2
    assert all("masks" not in item["pred_instances"] for item in merged)
    assert any("masks" in item["pred_instances"] for item in one_view)
    best = [float(item["pred_instances"]["scores"].max()) for item in merged]
    alone = [float(item["pred_instances"]["scores"].max()) for item in one_view]
    # The better of two views, one of which is the image as it is.
    assert all(a >= b - 1e-5 for a, b in zip(best, alone, strict=True))
    assert best != pytest.approx(alone, abs=1e-6)


def test_augmented_classification_averages_both_views(trained_classifier, predict):
    config, checkpoint = trained_classifier.config, trained_classifier.masks_off
    _, one_view = predict(config, checkpoint)
    result, merged = predict(config, checkpoint, tta=True)
    assert set(result.metrics) == {"accuracy/top1"}
    assert_close(torch.stack(scores(merged)).sum(1), torch.ones(8))
    _, other_view = predict(config, checkpoint, mirrored=True)
    assert not torch.equal(scores(other_view)[0], scores(one_view)[0])
    views = zip(scores(one_view), scores(other_view), strict=True)
    assert_close(scores(merged), [(a + b) / 2 for a, b in views])


def test_a_toolbox_without_default_augmentation_needs_its_own(detector_config):
    cfg = load_config(detector_config)
    cfg.default_scope = "mmpose"
    with pytest.raises(ConfigError, match="--tta: no default for scope 'mmpose'"):
        enable_tta(cfg)


def test_augmentation_of_the_config_is_used(detector_config):
    cfg = load_config(detector_config)
    cfg.tta_model = dict(type="Mine")
    cfg.tta_pipeline = [dict(type="Load")]
    inner = copy.deepcopy(cfg.model)
    enable_tta(cfg)
    assert next(datasets_of(cfg, "test")).pipeline == [dict(type="Load")]
    assert cfg.model == dict(type="Mine", module=inner)


def test_augmented_classification_cannot_be_drawn(classifier_config, tmp_path):
    cfg = load_config(classifier_config)
    enable_drawing(cfg, show=False, show_dir=str(tmp_path), wait_time=0)
    with pytest.raises(ConfigError, match="mmpretrain cannot draw augmented images"):
        enable_tta(cfg)


def test_a_picture_of_every_image_is_written(trained, trained_classifier, tmp_path):
    few_boxes = {"default_hooks.visualization.score_thr": 0.9}
    for kind, run, options in (
        ("detector", trained, few_boxes),
        ("classifier", trained_classifier, None),
    ):
        cfg = load_config(run.config, options, work_dir=str(tmp_path / "work"))
        folder = tmp_path / kind
        enable_drawing(cfg, show=False, show_dir=str(folder), wait_time=0)
        evaluate(cfg, run.masks_off)
        assert len(list(folder.rglob("*.*g"))) == 4


def test_drawing_needs_a_hook(detector_config):
    cfg = load_config(detector_config, {"default_hooks.visualization": None})
    with pytest.raises(ConfigError, match=r"default_hooks\.visualization"):
        enable_drawing(cfg, show=False, show_dir="x", wait_time=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.json", r"--out .*out\.json: end the name in \.pkl"),
        ("no/out.pkl", "folder"),
    ],
)
def test_predictions_go_to_a_pickle_in_a_folder_that_exists(
    name, message, detector_config, tmp_path
):
    cfg = load_config(detector_config)
    with pytest.raises(ConfigError, match=message):
        enable_output(cfg, str(tmp_path / name))
