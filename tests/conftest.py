"""What the tests share: real data, a tiny detector and classifier, and the commands."""

import hashlib
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import quick_mmengine  # noqa: F401, for its effect
import warm_python as warm_python_server
from drawn_data import draw_camvid, draw_coco
from filelock import FileLock

import mmcastling  # noqa: F401, before any toolbox, which keep placeholders for ops

ROOT = Path(__file__).resolve().parents[1]

# torch describes each step of compiling and exporting, as JSON, once any handler asks,
# and pytest 9 attaches its own to loggers that do not propagate: a tenth of an export.
logging.getLogger("torch.__trace").addHandler = lambda handler: None

# The nano detector of the demo at 128x128 (256 tokens), of two layers and levels, one
# class and four iterations. The branch's weight is 1, 0.63, 0.26 and 0 in them.
DETECTOR = """
_base_ = [{base!r}]
data_root = {data_root!r}
size = (128, 128)
metainfo = dict(classes=("person",))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=size, keep_ratio=False),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=size, keep_ratio=False),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/train.json",
        data_prefix=dict(img="train/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/val.json",
        data_prefix=dict(img="val/"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# A detector that has seen eight pictures finds persons by chance, which is enough here.
val_evaluator = dict(
    ann_file=data_root + "/annotations/val.json",
    metric_items=["mAP", "AR@100"],
)
test_evaluator = val_evaluator
# Without a score threshold an untrained detector still predicts.
model = dict(
    backbone=dict(
        img_size=128,
        arch=dict(
            _delete_=True,
            embed_dims=128,
            num_layers=2,
            num_heads=4,
            feedforward_channels=256,
        ),
    ),
    neck=dict(strides=(4, 8)),
    rpn_head=dict(anchor_generator=dict(scales=[8, 16], strides=[4, 8])),
    roi_head=dict(mask_head=dict(num_convs=1)),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=30)),
)
train_cfg = dict(max_iters=4, val_interval=10)
param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=False)]
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=2, max_keep_ckpts=-1)
)
custom_hooks = [
    dict(
        type="MaskDecayHook",
        mode="weight",
        start="0.5/N",
        curve="linear",
        finish=0.9,
        interval=1,
    )
]
"""

# The nano segmentor of CamVid on frames of 120x90 (96 tokens), four iterations, EMA.
SEGMENTOR = """
_base_ = [{base!r}]
data_root = {data_root!r}
crop_size = (64, 96)
train_pipeline = _base_.train_pipeline
train_pipeline[2].update(scale=(120, 90), ratio_range=(0.9, 1.2))
train_pipeline[3].update(crop_size=crop_size)
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=(120, 90))
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=2, dataset=dict(data_root=data_root, pipeline=train_pipeline), **loader
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, pipeline=test_pipeline), **loader
)
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=crop_size), backbone=dict(img_size=crop_size)
)
train_cfg = dict(max_iters=4, val_interval=4)
param_scheduler = [dict(type="ConstantLR", factor=1.0, by_epoch=False)]
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=2, max_keep_ckpts=-1)
)
custom_hooks = [
    dict(
        type="MaskDecayHook",
        mode="weight",
        start="0.5/N",
        curve="linear",
        finish=0.9,
        interval=1,
    ),
    dict(type="EMAHook", momentum=0.5),
]
"""

# Four 64x64 pictures a class, two iterations an epoch.
CLASSIFIER = """
_base_ = [{base!r}]
data_root = {data_root!r}
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=64),
    dict(type="PackInputs"),
]
dataset = dict(
    _delete_=True,
    type="CustomDataset",
    data_root=data_root,
    data_prefix="images",
    pipeline=pipeline,
)
data_preprocessor = dict(num_classes=2)
train_dataloader = dict(batch_size=4, num_workers=0, dataset=dataset)
val_dataloader = dict(batch_size=4, num_workers=0, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
model = dict(
    backbone=dict(arch="nano", img_size=64),
    head=dict(num_classes=2, in_channels=128),
    train_cfg=None,
)
train_cfg = dict(max_epochs=2)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=2, by_epoch=True)]
custom_hooks = [
    dict(type="MaskDecayHook", begin=0.7, finish=0.9),
    dict(type="EMAHook", momentum=0.5),
]
"""


# Files that take longest, which begin first, so that no process is left with one.
LONGEST = (
    "tests/export/test_export.py",
    "tests/tools/test_nuclei_demo.py",
    "tests/tools/test_bad_input.py",
    "tests/deploy/test_precision.py",
    "tests/tools/test_export.py",
    "tests/run/test_resume.py",
    "tests/tools/test_distributed.py",
    "tests/tools/test_recipes.py",
    "tests/compat/test_exact_resume_hook.py",
    "tests/test_toolbox.py",
)


def pytest_collection_modifyitems(items) -> None:
    """Put the longest files first; Makefile tells xdist to keep the order."""
    place = {ROOT / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(autouse=True, scope="session")
def no_data_variable():
    """Keep a developer's own data out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MMCASTLING_DATA", raising=False)
        yield


def shared_folder() -> Path:
    """Where real data for development lies, if anywhere."""
    fallback = ROOT.parent / "shared" / "data"
    return Path(os.environ.get("MMCASTLING_SHARED_DATA", fallback))


def pytest_report_header() -> str:
    """Say on which pictures the tests run."""
    folder = shared_folder()
    for name in ("tiny_coco", "camvid"):
        if not (folder / name).is_dir():
            return f"{folder} has no {name}: tests use pictures that they draw"
    return f"real pictures of COCO and CamVid from {folder}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data, for what a test says about these data themselves."""
    folder = shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set MMCASTLING_SHARED_DATA")
    return folder


def shared_base(tmp_path_factory) -> Path:
    """The folder of a test run, which its processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Make a folder once for all processes of a test run, which then only read it.

    ``make`` fills the folder that it is given; who asks first does the work.
    """
    base = shared_base(tmp_path_factory) / "made_once"
    base.mkdir(exist_ok=True)

    def made(name: str, make) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one who failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def tiny_coco(made_once) -> Path:
    """50 + 50 images of COCO 2017, or 16 + 12 drawn: 80 categories, the same layout."""
    folder = shared_folder() / "tiny_coco"
    if folder.is_dir():
        return folder
    return made_once("tiny_coco", lambda out: draw_coco(out, train=16, val=12))


@pytest.fixture(scope="session")
def camvid(made_once) -> Path:
    """123 + 34 road scenes, or 8 + 4 drawn, with label maps of 11 classes and void."""
    folder = shared_folder() / "camvid"
    if folder.is_dir():
        return folder
    return made_once("camvid", lambda out: draw_camvid(out, train=8, val=4))


@pytest.fixture(scope="session")
def make_scenes(camvid):
    """Make a data root of a few of CamVid's frames, a fourth as large, to be damaged.

    The names of the splits' folders are CamVid's, or those given.
    """
    import cv2

    def make(folder: Path, frames: int = 4, splits=("train", "val")) -> Path:
        for source, split in zip(("train", "val"), splits, strict=True):
            images = sorted((camvid / "images" / source).glob("*.jpg"))
            step = len(images) // frames
            for image in images[::step][:frames]:
                label = camvid / "annotations" / source / f"{image.stem}.png"
                for path, kind, how in (
                    (image, "images", cv2.INTER_AREA),
                    (label, "annotations", cv2.INTER_NEAREST),
                ):
                    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
                    out = folder / kind / split / path.name
                    out.parent.mkdir(parents=True, exist_ok=True)
                    small = cv2.resize(pixels, (120, 90), interpolation=how)
                    assert cv2.imwrite(str(out), small)
        return folder

    return make


@pytest.fixture(scope="session")
def scenes(make_scenes, made_once) -> Path:
    """Four frames a split in CamVid's layout."""
    return made_once("scenes", make_scenes)


@pytest.fixture(scope="session")
def segmentor_config(scenes, made_once) -> Path:
    """Config of the nano segmentor that trains in seconds on small frames."""
    base = str(ROOT / "configs" / "upernet_castling_nano_camvid.py")

    def make(folder):
        text = SEGMENTOR.format(base=base, data_root=str(scenes))
        (folder / "tiny_segmentor.py").write_text(text)

    return made_once("segmentor_config", make) / "tiny_segmentor.py"


def finished(config: Path, work_dir: Path, on: str, off: str) -> SimpleNamespace:
    """A run, with its checkpoints before and after its masks have decayed."""
    return SimpleNamespace(
        config=config,
        work_dir=work_dir,
        masks_on=work_dir / f"{on}.pth",
        masks_off=work_dir / f"{off}.pth",
    )


@pytest.fixture(scope="session")
def trained_segmentor(segmentor_config, made_once):
    """The segmentor after two iterations, masks on, and after four, masks off."""
    from mmcastling.run import load_config, train

    def make(folder):
        train(load_config(segmentor_config, work_dir=str(folder)))

    work_dir = made_once("segmentor", make)
    return finished(segmentor_config, work_dir, "iter_2", "iter_4")


@pytest.fixture(scope="session")
def make_people(tiny_coco):
    """Make a data root of a few images of tiny_coco with the persons in them."""

    def make(folder: Path, images: int = 4) -> Path:
        (folder / "annotations").mkdir(parents=True)
        for split in ("train", "val"):
            (folder / split).symlink_to(tiny_coco / f"{split}2017")
            source = tiny_coco / "annotations" / f"instances_{split}2017.json"
            data = json.loads(source.read_text())
            (person,) = [c for c in data["categories"] if c["name"] == "person"]
            boxes = [
                annotation
                for annotation in data["annotations"]
                if annotation["category_id"] == person["id"]
            ]
            kept = sorted({annotation["image_id"] for annotation in boxes})[:images]
            small = dict(
                images=[image for image in data["images"] if image["id"] in kept],
                annotations=[box for box in boxes if box["image_id"] in kept],
                categories=[person],
            )
            (folder / "annotations" / f"{split}.json").write_text(json.dumps(small))
        return folder

    return make


@pytest.fixture(scope="session")
def people(make_people, made_once) -> Path:
    """The data root of :func:`detector_config`; tests that damage it make their own."""
    return made_once("people", make_people)


@pytest.fixture(scope="session")
def detector_config(people, made_once) -> Path:
    """Config of a Mask R-CNN that trains in seconds on tiny_coco."""
    base = str(ROOT / "configs" / "mask_rcnn_castling_nano_nuclei.py")

    def make(folder):
        text = DETECTOR.format(base=base, data_root=str(people))
        (folder / "tiny_detector.py").write_text(text)

    return made_once("detector_config", make) / "tiny_detector.py"


@pytest.fixture(scope="session")
def classifier_config(made_once) -> Path:
    """Config of a classifier with EMA that trains in seconds on made-up pictures."""
    import mmcv

    def make(folder):
        noise = np.random.default_rng(0)
        for label, level in (("dark", 60), ("light", 180)):
            for index in range(4):
                picture = noise.integers(level - 50, level + 50, (64, 64, 3), np.uint8)
                mmcv.imwrite(picture, str(folder / f"images/{label}/{index}.png"))
        base = str(ROOT / "configs" / "castling_tiny_in1k.py")
        text = CLASSIFIER.format(base=base, data_root=str(folder))
        (folder / "tiny_classifier.py").write_text(text)

    return made_once("pictures", make) / "tiny_classifier.py"


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory) -> Path:
    """A Python that has the toolboxes imported already: see the module of its name."""
    base = shared_base(tmp_path_factory)
    name = hashlib.sha256(str(base).encode()).hexdigest()[:16]
    address = Path(tempfile.gettempdir()) / f"warm-{name}"  # no long path is allowed
    with FileLock(base / "warm.lock"):
        held = warm_python_server.lease(address, base / "warm.log")
    command = [sys.executable, "-S", warm_python_server.__file__, "run", str(address)]
    python = tmp_path_factory.mktemp("warm") / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    python.chmod(0o755)
    yield python
    held.close()


@pytest.fixture(scope="session")
def run_command(request):
    """Run a command of ``tools/`` as a person does, in a process of its own.

    ``fresh`` starts Python anew; else the process is a fork of :mod:`warm_python`.
    """

    def run(
        tool: str, *arguments, cwd: Path = ROOT, fresh: bool = False, **environment
    ):
        python = sys.executable if fresh else request.getfixturevalue("warm_python")
        return subprocess.run(
            [str(python), str(ROOT / "tools" / tool), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def trained(detector_config, run_command, made_once):
    """The detector after two iterations, masks on, and after four, masks off."""

    def make(folder):
        process = run_command("train.py", detector_config, "--work-dir", folder)
        assert process.returncode == 0, process.stderr[-3000:]

    work_dir = made_once("detector", make)
    return finished(detector_config, work_dir, "iter_2", "iter_4")


@pytest.fixture(scope="session")
def trained_classifier(classifier_config, made_once):
    """The classifier after one epoch, masks on, and after two, masks off; with EMA."""
    from mmcastling.run import load_config, train

    def make(folder):
        train(load_config(classifier_config, work_dir=str(folder)))

    work_dir = made_once("classifier", make)
    return finished(classifier_config, work_dir, "epoch_1", "epoch_2")


@pytest.fixture(scope="session")
def brightness(tmp_path_factory) -> Path:
    """An exported classifier: light pictures from dark ones, as classifier_config."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from mmcastling.runtime import ExportMetadata

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    constants = dict(
        weight=np.array([[-5, 5]], np.float32),
        axes=np.array([1, 2, 3]),
        shape=np.array([-1, 1]),
    )
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"]),
        helper.make_node("Reshape", ["mean", "shape"], ["column"]),
        helper.make_node("MatMul", ["column", "weight"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    images = helper.make_tensor_value_info("images", kind, ["n", 3, "h", "w"])
    scores = helper.make_tensor_value_info("scores", kind, ["n", 2])
    values = [onnx.numpy_helper.from_array(v, name) for name, v in constants.items()]
    graph = helper.make_graph(nodes, "brightness", [images], [scores], values)
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    entry = model.metadata_props.add()
    entry.key = "mmcastling"
    entry.value = ExportMetadata(
        kind="classifier",
        name="Brightness",
        outputs=("scores",),
        classes=("dark", "light"),
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        to_rgb=True,
    ).to_json()
    path = tmp_path_factory.mktemp("exported") / "brightness.onnx"
    onnx.save(model, path)
    return path


class _Opener:
    """Pickled as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="session")
def printed_difference():
    """Reads the largest difference of features that converting printed, on 4 images."""

    def read(text: str) -> float:
        return float(
            re.search(r"difference of features on 4 images: ([^\s,]+)", text)[1]
        )

    return read


@pytest.fixture
def attack(tmp_path):
    """A checkpoint that creates the file ``trace`` when it is unpickled."""
    import torch

    path, trace = tmp_path / "attack.pth", tmp_path / "trace"
    weights = {"weight": torch.zeros(2)}
    torch.save({"state_dict": weights, "meta": _Opener(trace)}, path)
    return SimpleNamespace(path=path, trace=trace, payload=_Opener(trace))


@pytest.fixture
def run_main(monkeypatch, capfd):
    """Run a command of ``tools/`` inside this process, as ``run_command`` does."""

    def run(tool: str, *arguments):
        path = str(ROOT / "tools" / tool)
        # Loggers of earlier runs in this process write to what pytest has closed.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            code = error.code
        captured = capfd.readouterr()
        return SimpleNamespace(
            returncode=code, stdout=captured.out, stderr=captured.err
        )

    return run


@pytest.fixture(scope="session")
def assert_same_training():
    """Compare all of two checkpoints that training goes on from, bit for bit."""
    import torch

    def same(one, other, where):
        assert type(one) is type(other), where
        if isinstance(one, dict):
            assert one.keys() == other.keys(), where
            for key in one:
                same(one[key], other[key], f"{where}.{key}")
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other), where
            for index, pair in enumerate(zip(one, other, strict=True)):
                same(*pair, f"{where}.{index}")
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other), where
        else:
            assert one == other, where

    def check(one, other):
        assert one.keys() == other.keys()
        for key in one.keys() - {"meta", "message_hub"}:
            same(one[key], other[key], key)
        assert one["meta"]["mask_decay"] == other["meta"]["mask_decay"]
        logs = [checkpoint["message_hub"]["log_scalars"] for checkpoint in (one, other)]
        assert logs[0].keys() == logs[1].keys() >= {"train/loss", "train/mask_weight"}
        for key in logs[0]:
            if not key.endswith("time"):
                assert logs[0][key].data[0].tolist() == logs[1][key].data[0].tolist()

    return check
