"""Configs: how data is moved, what is checked, and what is said of bad input."""

import json
import os
import shutil

import pytest

from mmcastling.data import CocoFormatError, DatasetError
from mmcastling.run import ConfigError, check_data, config, label_maps, load_config
from mmcastling.run.config import datasets_of, has_data, require
from mmcastling.run.work_dir import LOCK, check_work_dir, claimed_work_dir

COCO = "mask_rcnn_castling_s_coco.py"
IMAGENET = "castling_tiny_in1k.py"
NUCLEI = "mask_rcnn_castling_nano_nuclei.py"


def strings(node):
    """All text in a config."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from strings(value)


# -- moving the data -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old"),
    [(COCO, "data/coco"), (IMAGENET, "data/imagenet"), (NUCLEI, "data/nuclei")],
)
def test_data_root_moves_every_path(name, old, root):
    before = list(strings(load_config(root / "configs" / name)._cfg_dict))
    cfg = load_config(root / "configs" / name, {"data_root": "/elsewhere/set"})
    after = list(strings(cfg._cfg_dict))
    moved = [text for text in after if text.startswith("/elsewhere/set")]
    assert len(moved) == sum(text.startswith(old) for text in before) >= 4
    assert not [text for text in after if text.startswith("data/")]
    for split in ("train", "val", "test"):
        for dataset in datasets_of(cfg, split):
            assert dataset.data_root.rstrip("/") == "/elsewhere/set"


def test_data_sets_inside_wrappers_move_too(write_config):
    path = write_config(
        """
data_root = 'data/coco/'
part = dict(type='CocoDataset', data_root=data_root, ann_file=data_root + 'a.json')
repeated = dict(type='RepeatDataset', times=2, dataset=part)
dataset = dict(type='ConcatDataset', datasets=[repeated, part])
train_dataloader = dict(dataset=dataset)
val_evaluator = [dict(ann_file=data_root + 'b.json')]
"""
    )
    cfg = load_config(path, {"data_root": "/elsewhere"})
    inner = list(datasets_of(cfg, "train"))
    assert [part.data_root for part in inner] == ["/elsewhere/"] * 2
    assert [part.ann_file for part in inner] == ["/elsewhere/a.json"] * 2
    assert cfg.val_evaluator[0].ann_file == "/elsewhere/b.json"
    assert cfg.repeated.dataset.data_root == "/elsewhere/"


def test_the_variable_stands_for_the_folder_data(root, monkeypatch):
    monkeypatch.setenv("MMCASTLING_DATA", "/disk")
    for name, folder in ((COCO, "coco"), (IMAGENET, "imagenet"), (NUCLEI, "nuclei")):
        cfg = load_config(root / "configs" / name)
        for split in ("train", "val", "test"):
            for dataset in datasets_of(cfg, split):
                assert dataset.data_root.rstrip("/") == f"/disk/{folder}"
    cfg = load_config(root / "configs" / COCO, {"data_root": "/option"})
    assert cfg.test_dataloader.dataset.data_root.startswith("/option")


def test_the_variable_does_not_fit_data_outside_the_folder_data(
    monkeypatch, write_config
):
    monkeypatch.setenv("MMCASTLING_DATA", "/disk")
    path = write_config("data_root = '/mnt/set'")
    with pytest.raises(
        ConfigError, match=r"data_root is '/mnt/set': set it with --cfg"
    ):
        load_config(path)


def test_only_whole_folder_names_move(write_config):
    path = write_config("data_root = 'data/a'\nother = ['data/a2', 'data/a/b']")
    assert load_config(path, {"data_root": "x"}).other == ["data/a2", "x/b"]


def test_a_data_root_that_the_config_lacks_is_an_error(write_config):
    with pytest.raises(ConfigError, match="has no data_root that could be set"):
        load_config(write_config(""), {"data_root": "/elsewhere"})


# -- options and the file itself -------------------------------------------------------


@pytest.fixture
def write_config(tmp_path):
    """Write a config with a model and the given text."""

    def write(text, name="some.py"):
        path = tmp_path / name
        path.write_text(f"model = dict(type='A', depth=(1, 2))\n{text}\n")
        return path

    return write


def test_options_override_the_config_and_work_dir_follows_its_name(write_config):
    path = write_config("work = dict(a=1, b=[dict(c=2)])")
    cfg = load_config(path, {"work.b.0.c": 3, "new.key": "x"})
    assert (cfg.work.a, cfg.work.b[0].c, cfg.new.key) == (1, 3, "x")
    assert cfg.work_dir == "work_dirs/some"
    assert load_config(path, work_dir="mine").work_dir == "mine"
    assert load_config(write_config("work_dir = 'own'", "b.py")).work_dir == "own"


@pytest.mark.parametrize(
    "options", [{"model.type.x": 1}, {"hooks.3.a": 1}, {"hooks.first.a": 1}]
)
def test_options_that_do_not_fit_are_named(options, write_config):
    path = write_config("hooks = [dict(a=1)]")
    with pytest.raises(ConfigError, match=r"--cfg-options do not fit .*some\.py: "):
        load_config(path, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = (", "was never closed"),
        ("_base_ = ['./none.py']", r"none\.py"),
        ("custom_imports = dict(imports=['none_such'])", "none_such"),
        (
            "custom_imports = dict(imports=['mmcastling.engine.config'])",
            "mmcastling.engine has moved: .* it is mmcastling.run",
        ),
        ("default_scope = 'mmnothing'", "default_scope 'mmnothing' cannot be imported"),
        ("model = None", "lacks model"),
    ],
)
def test_a_config_that_cannot_be_used_says_why(text, message, write_config):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write_config(text))
    assert "Traceback" not in str(caught.value)


def test_what_is_required_is_listed(write_config):
    cfg = load_config(write_config("train_cfg = None\noptim_wrapper = dict()"))
    with pytest.raises(ConfigError, match="lacks train_dataloader, train_cfg: start"):
        require(cfg, "model", "train_dataloader", "train_cfg", "optim_wrapper")


# -- the data --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (COCO, "cocodataset.org"),
        (IMAGENET, "image-net.org"),
        (NUCLEI, "python tools/data/prepare_nuclei.py"),
    ],
)
def test_missing_data_says_how_to_get_it(name, how, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(root / "configs" / name)
    assert not has_data(cfg, "test")
    for split in ("train", "val", "test"):
        with pytest.raises(DatasetError) as caught:
            check_data(cfg, split)
        for part in ("data/", how, "data_root=FOLDER", "MMCASTLING_DATA"):
            assert part in str(caught.value)


def test_whole_coco_fits_the_coco_config(root, tiny_coco):
    cfg = load_config(root / "configs" / COCO, {"data_root": str(tiny_coco)})
    check_data(cfg, "train", "val", "test")
    assert has_data(cfg, "test")


def remove(path, data):
    path.unlink()


def empty(path, data):
    path.write_text("")


def truncate(path, data):
    path.write_text(json.dumps(data)[:-100])


def not_coco(path, data):
    path.write_text(json.dumps({"info": {}}))


def edit(change):
    def damage(path, data):
        change(data)
        path.write_text(json.dumps(data))

    return damage


DAMAGE = {
    "missing": (remove, r"train\.json"),
    "empty": (empty, r"train\.json"),
    "truncated": (truncate, r"train\.json"),
    "without lists": (not_coco, "images"),
    "unknown category": (
        edit(lambda data: data["categories"][0].update(name="robot")),
        "'robot'.* the classes are 'person'",
    ),
    "box outside": (
        edit(lambda data: data["annotations"][0].update(bbox=[0, 0, 9999, 5])),
        r"annotations\[0\].*9999.*leaves its image",
    ),
    "missing image file": (
        edit(lambda data: data["images"][0].update(file_name="gone.jpg")),
        r"1 of 4 images are not in .*gone\.jpg",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_annotations_are_described(kind, make_people, detector_config, tmp_path):
    damage, message = DAMAGE[kind]
    folder = make_people(tmp_path / "people")
    path = folder / "annotations" / "train.json"
    damage(path, json.loads(path.read_text()))
    cfg = load_config(detector_config, {"data_root": str(folder)})
    check_data(cfg, "test")  # the other file is whole
    with pytest.raises(CocoFormatError, match=message):
        check_data(cfg, "train")


# -- the work directory ----------------------------------------------------------------


def test_a_work_dir_is_created_and_left_clean(tmp_path):
    check_work_dir(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("below", ["", "below"])
def test_a_file_in_place_of_the_work_dir_is_named(below, tmp_path):
    (tmp_path / "taken").write_text("keep")
    with pytest.raises(ConfigError, match=r"taken.* cannot be written: .*--work-dir"):
        check_work_dir(tmp_path / "taken" / below)
    assert (tmp_path / "taken").read_text() == "keep"


def test_a_work_dir_has_one_training_at_a_time(tmp_path):
    with claimed_work_dir(tmp_path):
        with (
            pytest.raises(ConfigError, match="in use by another training") as error,
            claimed_work_dir(tmp_path),
        ):
            pytest.fail("two trainings share the folder")
        for part in (f"process {os.getpid()} on", str(tmp_path), "--work-dir"):
            assert part in str(error.value)
    with pytest.raises(KeyError), claimed_work_dir(tmp_path):
        raise KeyError  # which frees it as well
    with claimed_work_dir(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_training_left_locks_nothing(tmp_path):
    (tmp_path / LOCK).write_text("process 1 on elsewhere")
    with claimed_work_dir(tmp_path):
        pass


def test_a_work_dir_that_vanishes_is_named(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with (
        pytest.raises(ConfigError, match=r"run has vanished while training.*--resume"),
        claimed_work_dir(folder),
    ):
        shutil.rmtree(folder)
        (folder / "log.json").write_text("")
    folder.mkdir()
    with pytest.raises(PermissionError), claimed_work_dir(folder):
        raise PermissionError("of something else")


@pytest.mark.parametrize(
    ("loading", "upright"),
    [
        ({}, True),
        ({"color_type": "grayscale"}, True),
        ({"color_type": "color_ignore_orientation"}, False),
        ({"color_type": "unchanged"}, False),
        ({"imdecode_backend": "turbojpeg"}, False),
    ],
)
def test_images_are_checked_as_the_config_turns_them(
    detector_config, segmentor_config, monkeypatch, loading, upright
):
    seen = []

    def keep(*_, **options):
        seen.append(options["upright"])
        return []

    monkeypatch.setattr(config, "check_coco", keep)
    monkeypatch.setattr(label_maps, "check_segmentation", keep)
    step = "train_dataloader.dataset.pipeline.0"
    options = {f"{step}.{name}": value for name, value in loading.items()}
    for path in (detector_config, segmentor_config):
        check_data(load_config(path, options), "train")
    assert seen == [upright, upright]
