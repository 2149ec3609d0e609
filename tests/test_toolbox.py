"""From another folder, by another toolbox's means: names, inferencers, lookups."""

import shutil
import subprocess
import sys

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import DATASETS, HOOKS, MODELS, TRANSFORMS
from torch.testing import assert_close

import mmcastling
from mmcastling.compat.model_index import models
from mmcastling.run import convert, load_config
from mmcastling.train import MaskDecayHook
from mmcastling.verbs import castling_modules

DETECTOR = "mask_rcnn_castling_nano_nuclei"
CLASSIFIER = "castling_tiny_in1k"
SEGMENTOR = "upernet_castling_nano_camvid"


@pytest.fixture(scope="module")
def metafiles(root):
    index = mmengine.load(root / "model-index.yml")
    return [mmengine.load(root / part) for part in index["Import"]]


# -- the index -------------------------------------------------------------------------


def test_every_config_is_in_the_index_once_and_no_weights_are_promised(root, metafiles):
    entries = [entry for part in metafiles for entry in part["Models"]]
    names = sorted(entry["Name"] for entry in entries)
    assert names == sorted(path.stem for path in (root / "configs").glob("*.py"))
    collections = {c["Name"] for part in metafiles for c in part["Collections"]}
    for entry in entries:
        assert entry["Config"] == f"configs/{entry['Name']}.py"
        assert entry["In Collection"] in collections
        assert entry["Weights"] is None and entry["Results"] is None
        assert entry["Metadata"]["FLOPs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "castling_tiny_in1k",
        "castling_levit_256_in1k",
        "swin_tiny_in1k",
        "mask2former_castling_b_ade20k",
        DETECTOR,
        SEGMENTOR,
    ],
)
@pytest.mark.long
def test_costs_of_the_index_are_counted(root, name, monkeypatch):
    monkeypatch.syspath_prepend(root / "tools" / "analysis")
    from make_metafile import entry

    assert entry(load_config(root / "configs" / f"{name}.py")) == models()[name]


def test_a_config_is_found_by_name_and_a_wrong_name_is_corrected(root):
    path = mmcastling.find_config(DETECTOR)
    assert path == str(root / "configs" / f"{DETECTOR}.py")
    assert mmcastling.find_config(f"{DETECTOR}.py") == path
    with pytest.raises(ValueError, match=r"did you mean castling_tiny_in1k"):
        mmcastling.find_config("castling_tiny_in1")


# -- MMEngine's lookup -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "toolbox"),
    [(CLASSIFIER, "mmpretrain"), (DETECTOR, "mmdet"), (SEGMENTOR, "mmseg")],
)
def test_a_config_of_another_folder_inherits_ours_and_is_built(
    root, tmp_path, name, toolbox
):
    own = tmp_path / "own.py"
    own.write_text(
        f"_base_ = ['mmcastling::castling/{name}.py']\n"
        "model = dict(backbone=dict(arch='nano', img_size=64))\n"
    )
    cfg, ours = load_config(own), load_config(root / "configs" / f"{name}.py")
    assert cfg.default_scope == toolbox
    # MMEngine marks what comes from us, to be built in our scope.
    assert without_scope(cfg.train_dataloader) == without_scope(ours.train_dataloader)
    model = MODELS.build(cfg.model)
    assert type(model).__module__.startswith(f"{toolbox}.")
    assert len(list(castling_modules(model))) == 4
    for split in ("train", "test"):
        dataset = cfg[f"{split}_dataloader"].dataset
        kind = DATASETS.build(dict(dataset, lazy_init=True))
        assert type(kind).__module__.startswith(f"{toolbox}.")
        for step, made in zip(dataset.pipeline, kind.pipeline.transforms, strict=True):
            assert type(made) is type(TRANSFORMS.build(without_scope(step)))
    for hook in cfg.custom_hooks:
        assert isinstance(HOOKS.build(hook), MaskDecayHook)
    with pytest.raises(KeyError, match="Unheard"):
        MODELS.build(dict(type="Unheard", _scope_="mmcastling"))


def without_scope(node):
    """A config without MMEngine's marks of where its parts came from."""
    if isinstance(node, dict):
        return {k: without_scope(v) for k, v in node.items() if k != "_scope_"}
    if isinstance(node, (list, tuple)):
        return type(node)(without_scope(item) for item in node)
    return node


def test_the_hub_finds_ours(root):
    found = get_config(f"mmcastling::castling/{CLASSIFIER}.py")
    ours = Config.fromfile(root / "configs" / f"{CLASSIFIER}.py")
    assert found._cfg_dict == ours._cfg_dict


ELSEWHERE = """
import sys
from mmengine.config import Config
cfg = Config.fromfile("own.py")  # imports mmcastling, by custom_imports
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, init_default_scope
import mmdet.registry, mmpretrain.registry, mmseg.registry
import mmcv.ops
for toolbox in ("mmdet", "mmpretrain", "mmseg"):
    registry = sys.modules[toolbox + ".registry"]
    for build in (registry.MODELS.build, MODELS.build):
        init_default_scope(toolbox)
        model = build(dict(cfg.model))
        assert type(model).__name__ == "CastlingViT", model
    neck = registry.MODELS.get("mmcastling.SimpleFeaturePyramid")
    assert neck is not None
    assert issubclass(registry.HOOKS.get("MaskDecayHook"), Hook)
    assert registry.MODELS.get("mmcastling.DistilledClassifier") is not None
    wrapper = registry.OPTIM_WRAPPER_CONSTRUCTORS
    assert wrapper.get("mmcastling.LayerDecayOptimWrapperConstructor")
import timm
assert len(timm.list_models("castling_vit_*")) == 5
print("found")
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["custom_imports", "import"])
def test_our_types_are_visible_in_every_toolbox_from_any_folder(how, tmp_path):
    config = "model = dict(type='mmcastling.CastlingViT', arch='nano', img_size=32)\n"
    code = ELSEWHERE
    if how == "custom_imports":
        config += "custom_imports = dict(imports=['mmcastling'])\n"
    else:
        code = f"import mmcastling\n{ELSEWHERE}"
    (tmp_path / "own.py").write_text(config)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("found")


@pytest.mark.slow
def test_a_wheel_holds_configs_and_index_where_the_tools_look(root, tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "data", "work_dirs", "__pycache__", "docs")
    shutil.copytree(root, source, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "lib"],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    mim = tmp_path / "lib" / "mmcastling" / ".mim"
    index = mmengine.load(mim / "model-index.yml")
    for part in index["Import"]:
        for entry in mmengine.load(mim / part)["Models"]:
            assert (mim / entry["Config"]).is_file()
            assert (mim / "configs" / "castling" / f"{entry['Name']}.py").is_file()
    assert (mim / "configs" / "castling" / "_base_").is_dir()
    assert (mim / "tools" / "train.py").is_file()
    assert not list(mim.rglob("__pycache__"))


# -- mmpretrain ------------------------------------------------------------------------


def test_mmpretrain_knows_our_classifiers_by_name_and_by_path(root):
    import mmpretrain

    assert CLASSIFIER in mmpretrain.list_models("castling_")
    assert DETECTOR not in mmpretrain.list_models("mask_rcnn")
    for name in (CLASSIFIER, str(root / "configs" / f"{CLASSIFIER}.py")):
        model = mmpretrain.get_model(name, head=dict(num_classes=3))
        assert len(list(castling_modules(model))) == 12
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    # A distilled one comes without its teacher, which would have to be downloaded.
    model = mmpretrain.get_model("castling_levit_128s_in1k")
    assert type(model).__name__ == "DistilledClassifier"
    with pytest.raises(ValueError, match='Failed to find model "castling_tinny"'):
        mmpretrain.get_model("castling_tinny")


@pytest.mark.slow
def test_the_classification_inferencer_takes_trained_and_deployed(
    trained_classifier, tmp_path
):
    from mmpretrain import ImageClassificationInferencer

    cfg = load_config(trained_classifier.config)
    out = tmp_path / "deployed.pth"
    convert(cfg, trained_classifier.masks_off, out)
    picture = np.random.default_rng(0).integers(0, 255, (70, 60, 3), np.uint8)
    results = []
    for config, weights in (
        (trained_classifier.config, trained_classifier.masks_off),
        (out.with_suffix(".py"), out),
    ):
        inferencer = ImageClassificationInferencer(str(config), pretrained=str(weights))
        mmcastling_model = inferencer.model
        if weights != out:
            mmcastling.set_mask(mmcastling_model, 1.0)
        (result,) = inferencer(picture)
        results.append(result)
    assert results[0]["pred_class"] == results[1]["pred_class"]
    assert results[0]["pred_class"] in ("dark", "light")
    assert_close(results[0]["pred_scores"], results[1]["pred_scores"])


# -- mmdet -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_detection_inferencer_takes_trained_and_deployed(trained, tmp_path):
    from mmdet.apis import DetInferencer

    cfg = load_config(trained.config)
    out = tmp_path / "deployed.pth"
    convert(cfg, trained.masks_off, out)
    picture = np.random.default_rng(0).integers(0, 255, (100, 120, 3), np.uint8)
    results = []
    for config, weights in (
        (trained.config, trained.masks_off),
        (out.with_suffix(".py"), out),
    ):
        inferencer = DetInferencer(str(config), str(weights), show_progress=False)
        if weights != out:
            mmcastling.set_mask(inferencer.model, 1.0)
        (result,) = inferencer(picture, no_save_vis=True)["predictions"]
        results.append(result)
    assert results[0]["bboxes"]
    for key in ("labels", "scores", "bboxes"):
        assert_close(torch.tensor(results[0][key]), torch.tensor(results[1][key]))


BY_NAME = """
import sys
import mmcastling
import numpy as np
from mmdet.apis import DetInferencer
from mmengine.infer import BaseInferencer
from mmseg.apis import MMSegInferencer

mmcastling.compat.on_import.install()  # again, to no effect
detector, weights = sys.argv[1:]
known = BaseInferencer.list_models("mmdet")
assert known.count(detector) == 1 and "rtmdet_tiny_8xb32-300e_coco" in known
assert "castling_tiny_in1k" not in known
assert detector not in BaseInferencer.list_models("mmseg")
inferencer = DetInferencer(detector, weights, device="cpu", show_progress=False)
(result,) = inferencer(np.zeros((64, 64, 3), np.uint8), no_save_vis=True)["predictions"]
assert result["bboxes"]
assert len(list(mmcastling.castling_modules(inferencer.model))) == 4
try:
    DetInferencer("mask_rcnn_castling_xxl", device="cpu")
except ValueError as error:
    assert "Cannot find model: mask_rcnn_castling_xxl" in str(error)
    print("found")
"""


@pytest.mark.slow
def test_the_detection_inferencer_takes_a_model_by_name_from_any_folder(
    root, tmp_path, warm_python
):
    model = MODELS.build(load_config(root / "configs" / f"{DETECTOR}.py").model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "by_name.py").write_text(BY_NAME)
    done = subprocess.run(
        [str(warm_python), "by_name.py", DETECTOR, "weights.pth"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("found")


# -- timm ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm")


def test_timm_lists_every_size(timm):
    assert timm.list_models("castling_*") == sorted(
        [f"castling_levit_{size}" for size in ("128", "128s", "192", "256", "384")]
        + [f"castling_mvit_{size}" for size in ("tiny", "small", "base")]
        + [f"castling_vit_{s}" for s in ("nano", "tiny", "small", "base", "large")]
    )


@pytest.mark.parametrize(
    "name", ["castling_vit_nano", "castling_levit_128s", "castling_mvit_tiny"]
)
def test_timm_creates_and_reparameterizes(timm, name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, drop_path_rate=0.1, img_size=64)
    x = torch.randn(2, 3, 64, 64)
    for _ in range(2):  # moves the statistics of batch norms
        model(x)
    model.eval()
    with torch.no_grad():
        mmcastling.set_mask(model, 0.0)
        branch_on = model(x)
        mmcastling.set_mask(model, 1.0)
        expected = model(x)
        deployed = timm.utils.reparameterize_model(model)
        assert not list(castling_modules(deployed)) and list(castling_modules(model))
        assert_close(deployed(x), expected, atol=1e-4, rtol=1e-4)
        assert (branch_on - expected).abs().max() > 1e-4
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features)
        assert_close(model.forward_head(features), expected)
        model.reset_classifier(0)
        assert_close(model(x), features)
    assert model.get_classifier() is None
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 64, 64)


def test_timm_loads_what_we_train_and_what_we_convert(timm, tmp_path):
    import mmpretrain

    source = mmpretrain.get_model(
        CLASSIFIER,
        backbone=dict(arch="nano"),
        head=dict(num_classes=5, in_channels=128),
    )
    path = tmp_path / "trained.pth"
    torch.save({"state_dict": source.state_dict()}, path)
    name = "castling_vit_nano"
    model = timm.create_model(name, num_classes=5, checkpoint_path=str(path)).eval()
    mmcastling.set_mask(source, 1.0)
    mmcastling.set_mask(model, 1.0)
    x = torch.randn(1, 3, 224, 224)
    assert_close(model(x), source(x))
    torch.save(mmcastling.switch_to_deploy(source).state_dict(), path)
    options = dict(num_classes=5, deploy=True, checkpoint_path=str(path))
    assert_close(timm.create_model(name, **options).eval()(x), source(x))


def test_timm_takes_other_channels_and_batches_train(timm):
    model = timm.create_model("castling_vit_nano", in_chans=1, img_size=32)
    model.set_grad_checkpointing()
    model.train()(torch.randn(2, 1, 32, 32)).sum().backward()
    assert model.backbone.with_cp
    assert all(p.grad is not None for p in model.parameters())
    assert model.no_weight_decay() == {"backbone.pos_embed", "backbone.cls_token"}


# Of a size of each family: layers that decay, outputs, and channels of the last.
IN_TIMM = {
    "castling_vit_nano": (4, 4, 128),
    "castling_levit_128s": (11, 3, 384),
    "castling_mvit_tiny": (10, 4, 768),
}


@pytest.mark.parametrize("name", IN_TIMM)
def test_timms_optimizers_decay_the_learning_rate_by_layer(timm, name):
    model = timm.create_model(name, num_classes=5, img_size=64)
    layers, decay = IN_TIMM[name][0], 0.75
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, lr=1.0, layer_decay=decay)
    scales = {
        id(p): group["lr_scale"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(set(scales.values())) == layers + 2
    for name, parameter in model.named_parameters():
        layer, count = model.backbone.get_layer_depth(name, "backbone.")
        assert scales[id(parameter)] == pytest.approx(decay ** (count - 1 - layer))
    assert min(scales.values()) == pytest.approx(decay ** (layers + 1))


@torch.no_grad()
@pytest.mark.parametrize("name", IN_TIMM)
def test_timms_own_expectations_of_a_model(timm, name):
    _, count, width = IN_TIMM[name]
    model = timm.create_model(name, num_classes=5, img_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    cfg, names = model.default_cfg, model.state_dict()
    assert {f"{cfg[key]}.weight" for key in ("classifier", "first_conv")} <= set(names)
    features, maps = model.forward_intermediates(x)
    assert_close(features, model.forward_features(x))
    assert_close(model.forward_head(features, pre_logits=True), features)
    assert len(maps) == len(model.feature_info) == count
    for info, found in zip(model.feature_info, maps, strict=True):
        side = 64 // info["reduction"]
        assert found.shape == (1, info["num_chs"], side, side)
        assert model.get_submodule(info["module"])
    assert maps[-1].shape[1] == width
    options = dict(indices=[0, -1], intermediates_only=True, output_fmt="NLC")
    pairs = model.forward_intermediates(x, return_prefix_tokens=True, **options)
    for (tokens, prefix), found in zip(pairs, (maps[0], maps[-1]), strict=True):
        assert_close(tokens.transpose(1, 2), found.flatten(2))
        assert prefix.shape[1] == ("vit_nano" in name)
    model.reset_classifier(3)
    assert model(x).shape == (1, 3) and model.get_classifier() is model.head
    getter = timm.create_model(name, img_size=64, features_only=True, out_indices=(0,))
    getter.model.backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    (found,) = getter.eval()(x)
    assert_close(found, maps[0])
    assert getter.feature_info.channels() == [found.shape[1]]
    inside = sum(p.numel() for p in getter.parameters())
    assert inside < sum(p.numel() for p in model.parameters()) / 2
    assert getter.model.forward_features(x).shape[0] == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("castling_vit_nano", dict(pretrained=True), "has no pretrained weights"),
        ("castling_levit_128s", dict(in_chans=1), "takes images of 3 channels"),
    ],
)
def test_what_timm_may_ask_for_in_vain(timm, name, options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **options)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("castling_vit_unheard_of")
