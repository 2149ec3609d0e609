"""Every recipe trains: two iterations on real images, as small as they may be.

The configs are as they are but for the size of images and batches, the number of
iterations, and the depth of what has a sibling that trains at its full depth. That all
of them build at full size is ``test_configs.py``'s matter.
"""

import json
import math
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import DATA_SAMPLERS, MODELS

from mmcastling.run import convert, load_config, train
from mmcastling.run.failures import is_meant_for_the_user
from mmcastling.run.load import TOLERANCE
from mmcastling.verbs import castling_modules

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.py"))
# Trained elsewhere: the demo, and what test_detectors.py and test_segmentors.py train
# and evaluate.
ELSEWHERE = ("nuclei", "mask_rcnn_castling_mvit_t", "mask_rcnn_softmax_mvit_t")
ELSEWHERE += ("retinanet_", "ade20k", "camvid", "castling_swin", "castling_timm")
NAMES = [p.stem for p in CONFIGS if not any(part in p.stem for part in ELSEWHERE)]

# Trained at the depth that they are published with, one of each family; their siblings
# at full width, with a layer or two of each kind.
AT_FULL_DEPTH = ("castling_tiny_in1k", "castling_levit_128s_in1k")
AT_FULL_DEPTH += ("castling_mvit_tiny_in1k", "mask_rcnn_swin_t_coco", "swin_tiny_in1k")
AT_FULL_DEPTH += ("mask_rcnn_castling_s_coco", "rtmdet_castling_levit_128_coco")
SHALLOW = {
    "CastlingViT": dict(num_layers=2),
    "CastlingLeViT": dict(depths=[1, 1, 1]),
    "CastlingMViT": dict(num_layers=5, downscale_indices=[1, 2, 4]),
}

ALL = """
_base_ = [{base!r}]
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2, val_interval=9)
val_dataloader = val_cfg = val_evaluator = None
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=-1, save_last=False))
log_processor = dict(by_epoch=False)
"""
CLASSIFIER = """
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale={size}),
    dict(type="PackInputs"),
]
dataset = dict(
    _delete_=True,
    type="CustomDataset",
    data_root={data_root!r},
    data_prefix="train",
    pipeline=pipeline,
)
train_dataloader = dict(
    batch_size={batch},
    num_workers=0,
    persistent_workers=False,
    dataset=dataset,
    sampler=dict(_delete_=True, type="InfiniteSampler", shuffle=True),
)
test_dataloader = dict(
    num_workers=0, persistent_workers=False, batch_size=4, dataset=dataset
)
"""
DETECTOR = """
size = (128, 128)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask={masks}),
    dict(type="Resize", scale=size, keep_ratio=False),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=train_pipeline),
)
"""
# 32 proposals for 2,000: most of a step is what follows them.
FEW_PROPOSALS = """
model = dict(train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=32)))
"""
TEACHER = """
model = dict(
    teacher=dict(model_name="resnet10t", pretrained=False),
    teacher_checkpoint={checkpoint!r},
)
"""


@pytest.fixture(scope="module")
def imagenet(tiny_coco, tmp_path_factory):
    """Eight photographs in ImageNet's layout: what they show most is their class."""
    root = tmp_path_factory.mktemp("imagenet")
    file = tiny_coco / "annotations" / "instances_train2017.json"
    data = json.loads(file.read_text())
    for image in data["images"][:8]:
        areas = {
            a["area"]: a["category_id"]
            for a in data["annotations"]
            if a["image_id"] == image["id"]
        }
        folder = root / "train" / f"n{areas[max(areas)] if areas else 0:08}"
        folder.mkdir(parents=True, exist_ok=True)
        picture = cv2.imread(str(tiny_coco / "train2017" / image["file_name"]))
        assert cv2.imwrite(str(folder / image["file_name"]), picture)
    return root


@pytest.fixture(scope="module")
def timm_teacher(tmp_path_factory):
    """A teacher of ImageNet's classes; RegNetY-16GF would have to be downloaded."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "resnet10t.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), path)
    return path


def small_config(name, root, folder, imagenet, tiny_coco, teacher):
    """Write the small version of a config; return it loaded."""
    text = ALL.format(base=str(root / "configs" / f"{name}.py"))
    if name.endswith("_in1k"):
        text += CLASSIFIER.format(
            data_root=str(imagenet),
            size=224 if "swin" in name else 64,  # Swin's windows need that much
            batch=2 if "swin" in name else 4,
        )
        if "levit" in name:
            text += TEACHER.format(checkpoint=str(teacher))
        options = {}
    else:
        text += DETECTOR.replace("{masks}", str("mask" in name))
        if "rcnn" in name:
            text += FEW_PROPOSALS
        options = dict(data_root=str(tiny_coco) + "/")
        if "dsb2018" in name:  # on people in place of nuclei
            options["train_dataloader.dataset"] = dict(
                ann_file="annotations/instances_train2017.json",
                data_prefix=dict(img="train2017/"),
                metainfo=dict(classes=("person",), palette=[(220, 20, 60)]),
            )
        # Jitter's padding to 1024x1024.
        options["model.data_preprocessor.batch_augments"] = None
    path = folder / f"small_{name}.py"
    path.write_text(text)
    cfg = load_config(path, options, work_dir=str(folder / name))
    if name not in AT_FULL_DEPTH:
        make_shallow(cfg.model)
    return cfg


def make_shallow(model):
    """Leave few layers in the backbone and narrow what is linear in a detector."""
    kind = MODELS.get(model.backbone.type)
    arch = kind.arch_zoo[model.backbone.arch]
    model.backbone.arch = {**arch, **SHALLOW[kind.__name__]}
    heads = model.get("roi_head", {}).get("bbox_head", [])
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 64


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_two_iterations_train(name, root, tmp_path, imagenet, tiny_coco, timm_teacher):
    cfg = small_config(name, root, tmp_path, imagenet, tiny_coco, timm_teacher)
    model = train(cfg)
    hub = MessageHub.get_current_instance()
    scalars = {
        key.removeprefix("train/"): value.current()
        for key, value in hub.log_scalars.items()
    }
    assert hub.get_info("iter") == 1  # the second
    assert math.isfinite(scalars["loss"]) and scalars["loss"] > 0
    assert all(p.isfinite().all() for p in model.parameters())
    if "levit" in name and name.endswith("_in1k"):
        assert scalars["loss_distillation"] > 0
    if "castling" in name:
        assert not any(module.mask_is_on for _, module in castling_modules(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(teacher_checkpoint="missing.pth"), "missing.pth does not exist"),
        (dict(head=dict(num_classes=3)), "teacher has 1000 classes, the student 3"),
    ],
)
def test_a_bad_teacher_ends_training_before_it_begins(
    root, tmp_path, imagenet, tiny_coco, timm_teacher, options, message
):
    name = "castling_levit_128s_in1k"
    cfg = small_config(name, root, tmp_path, imagenet, tiny_coco, timm_teacher)
    cfg.merge_from_dict(dict(model=options))
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        train(cfg)
    assert is_meant_for_the_user(caught.value)
    assert not list(Path(cfg.work_dir).rglob("*.pth"))


@pytest.mark.slow
def test_a_distilled_recipe_is_converted_without_its_teacher(
    root, tmp_path, imagenet, tiny_coco, timm_teacher
):
    name = "castling_levit_128s_in1k"
    cfg = small_config(name, root, tmp_path, imagenet, tiny_coco, timm_teacher)
    cfg.default_hooks.checkpoint.update(interval=2)
    make_shallow(cfg.model)
    train(cfg)
    timm_teacher = Path(cfg.model.teacher_checkpoint)
    hidden = timm_teacher.rename(timm_teacher.with_suffix(".hidden"))
    try:
        out = tmp_path / "deployed.pth"
        report = convert(cfg, Path(cfg.work_dir) / "iter_2.pth", out)
    finally:
        hidden.rename(timm_teacher)
    assert report.images
    assert report.difference < TOLERANCE  # batch norms were folded
    text = out.with_suffix(".py").read_text()
    assert "teacher" not in text and "ImageClassifier" in text
    deployed = load_config(out.with_suffix(".py"))
    model = MODELS.build(deployed.model)
    weights = torch.load(out, weights_only=True)["state_dict"]
    assert not [key for key in weights if "teacher" in key]
    model.load_state_dict(weights)
    assert isinstance(model.head.head, torch.nn.Linear)  # its batch norm is folded in


def test_the_recipe_of_levit_is_that_of_its_training_script(root):
    cfg = load_config(root / "configs" / "castling_levit_256_in1k.py")
    loader = cfg.train_dataloader
    assert cfg.train_cfg.max_epochs == 1000
    assert cfg.optim_wrapper.optimizer.lr == 5e-4 * 8 * loader.batch_size / 512
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.025
    assert cfg.optim_wrapper.clip_factor == 0.01
    assert "clip_grad" not in cfg.optim_wrapper
    assert (cfg.model.mode, cfg.model.alpha) == ("hard", 0.5)
    sampler = DATA_SAMPLERS.build(dict(loader.sampler, dataset=range(512)))
    order = list(sampler)
    assert len(order) == 512 and len(set(order)) <= 171  # three of each


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("_in1k")])
def test_the_batch_is_the_one_the_learning_rate_is_for(root, name):
    cfg = load_config(root / "configs" / f"{name}.py")
    steps = cfg.optim_wrapper.get("accumulative_counts", 1)
    batch = 8 * cfg.train_dataloader.batch_size * steps
    assert batch == cfg.auto_scale_lr.base_batch_size
    per_image = {1024: 1e-3, 2048: 2e-3}
    assert cfg.optim_wrapper.optimizer.lr == per_image[batch]


def test_classifier_twins_differ_in_their_attention_and_its_convolution_only(root):
    def settings(name):
        cfg = load_config(root / "configs" / f"{name}_in1k.py")._cfg_dict.to_dict()
        backbone = cfg["model"]["backbone"]
        attention = backbone.pop("attention")["type"]
        backbone.pop("ffn_conv"), cfg.pop("custom_hooks"), cfg.pop("work_dir")
        return attention, cfg

    twins = dict(settings(f"{m}_small") for m in ("castling", "softmax", "performer"))
    assert list(twins) == ["castling", "softmax", "performer"]
    assert twins["castling"] == twins["softmax"] == twins["performer"]
