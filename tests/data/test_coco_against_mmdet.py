"""The COCO check held to mmdet: what mmdet trains rightly passes, all else is told."""

import copy
import io
import json
from contextlib import redirect_stdout

import pytest
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations
from mmengine.config import Config

from mmcastling.data import CocoFormatError, check_coco
from mmcastling.run import ConfigError, check_data

CLASSES = ("cat", "dog")
GOOD = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50},
        {"id": 2, "file_name": "b.jpg", "width": 60, "height": 60},
    ],
    "annotations": [
        {
            **dict(id=11, image_id=1, category_id=7, area=400, iscrowd=0),
            "bbox": [10, 10, 20, 20],
            "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]],
        },
        {
            **dict(id=12, image_id=2, category_id=8, area=3600, iscrowd=1),
            "bbox": [0, 0, 60, 60],
            "segmentation": {"size": [60, 60], "counts": [0, 3600]},
        },
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
}


def first(**change):
    """Change the first annotation; None removes a key."""

    def edit(data):
        entry = data["annotations"][0]
        entry.update(change)
        for key in [key for key, value in change.items() if value is None]:
            del entry[key]

    return edit


def last(**change):
    return lambda data: data["annotations"][1].update(change)


def category(name, identity=9, at=None):
    def edit(data):
        at_ = len(data["categories"]) if at is None else at
        data["categories"].insert(at_, {"id": identity, "name": name})

    return edit


def together(*edits):
    def edit(data):
        for one in edits:
            one(data)

    return edit


def ids_of_floats(data):
    for image in data["images"]:
        image["id"] = float(image["id"])
    for entry in data["annotations"]:
        entry["image_id"], entry["id"] = float(entry["image_id"]), entry["id"] * 1.0


def only_cats(data):
    del data["categories"][1], data["annotations"][1]


ROOT_OF_ROBOFLOW = category("pets", 0, at=0)

# name -> change of the file, classes of the config, whether masks are asked for, and
# what the check says: nothing, a warning, or an error
TABLE = {
    "as it is": (None, CLASSES, True, None),
    "one class of two": (None, ("cat",), True, "1 as category 'dog'"),
    "the other class of two": (None, ("dog",), True, "1 as category 'cat'"),
    "unused category first": (ROOT_OF_ROBOFLOW, CLASSES, True, None),
    "unused category last": (category("cow"), CLASSES, True, None),
    "unused category of one name": (category("cow"), (*CLASSES, "cow"), True, None),
    "unused category twice": (
        together(category("cow", 9), category("cow", 10)),
        *(CLASSES, True, None),
    ),
    "class twice": (category("cat", at=0), CLASSES, True, ["repeats the name 'cat'"]),
    "classes in another order": (
        *(None, ("dog", "cat"), True),
        ["not in the order", "classes=('cat', 'dog'))"],
    ),
    "other classes": (None, ("cow",), True, ["none of the file's 2 categories"]),
    "last class missing": (only_cats, CLASSES, True, "1 of 2 classes have no category"),
    "first class missing": (
        *(only_cats, ("dog", "cat"), True),
        ["not in the order of the file's categories"],
    ),
    "no mask, none asked for": (first(segmentation=None), CLASSES, False, None),
    "no mask": (first(segmentation=None), CLASSES, True, ["segmentation None"]),
    "empty mask": (first(segmentation=[]), CLASSES, True, ["segmentation []"]),
    "short polygon": (
        first(segmentation=[[1, 2, 3, 4]]),
        *(CLASSES, True, ["4 numbers in polygon 0"]),
    ),
    "short polygon, no masks": (
        first(segmentation=[[1, 2, 3, 4]]),
        *(CLASSES, False, None),
    ),
    "no mask in another class": (
        last(segmentation=None),
        *(("cat",), True, "1 as category 'dog'"),
    ),
    "no mask in what is left out": (
        first(segmentation=None, area=0),
        *(CLASSES, True, "1 as area is 0"),
    ),
    "area 0": (first(area=0), CLASSES, True, "1 as area is 0"),
    "area missing": (first(area=None), CLASSES, True, ["has no area"]),
    "area is text": (first(area="4"), CLASSES, True, ["has area '4'"]),
    "thin box": (first(bbox=[1, 1, 0.5, 9]), CLASSES, True, "a side of the box"),
    "ignored": (first(ignore=1), CLASSES, True, "1 as 'ignore' is set"),
    "nothing left": (
        together(first(area=0), last(area=0)),
        *(CLASSES, True, ["no annotation is left to train on, of 2: 2 as area is 0"]),
    ),
    "no iscrowd": (first(iscrowd=None), CLASSES, True, None),
    "iscrowd is text": (first(iscrowd="0"), CLASSES, True, ["iscrowd '0'"]),
    "category ids of text": (
        together(
            lambda data: data["categories"][0].update(id="7"), first(category_id="7")
        ),
        *(CLASSES, True, None),
    ),
    "ids that are floats": (ids_of_floats, CLASSES, True, None),
    "image id of text": (first(image_id="1"), CLASSES, True, ["image_id '1'"]),
    "unknown category": (first(category_id=3), CLASSES, True, ["category_id 3"]),
    "ids repeated": (first(id=12), CLASSES, True, ["repeats an annotation id"]),
    "no annotations of an image": (
        lambda data: data["annotations"].pop(),
        *(CLASSES, True, None),
    ),
    "no size": (lambda data: data["images"][0].pop("width"), CLASSES, True, ["width"]),
}


@pytest.fixture(params=TABLE)
def case(request, tmp_path):
    edit, classes, masks, says = TABLE[request.param]
    data = copy.deepcopy(GOOD)
    if edit is not None:
        edit(data)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    for image in GOOD["images"]:
        (tmp_path / image["file_name"]).touch()
    return path, data, classes, masks, says


def trained_by_mmdet(path, data, classes, masks):
    """What mmdet trains on, ``'rightly'``, ``'in part'`` or ``'wrongly'``."""
    got, wanted = set(), set()
    names = {entry["id"]: entry["name"] for entry in data["categories"]}
    try:
        with redirect_stdout(io.StringIO()):
            dataset = CocoDataset(
                ann_file=str(path),
                data_prefix=dict(img=""),
                metainfo=dict(classes=classes),
                pipeline=[],
            )
        load = LoadAnnotations(with_bbox=True, with_mask=masks)
        for index in range(len(dataset)):
            info = dataset.get_data_info(index)
            info["ori_shape"] = info["height"], info["width"]
            image = info["img_id"]
            load.transform(info)
            ignored = info["gt_ignore_flags"]
            boxes = info["gt_bboxes"].tensor.tolist()
            for box, label, skip in zip(
                boxes, info["gt_bboxes_labels"], ignored, strict=True
            ):
                got.add((image, classes[label], tuple(box), bool(skip)))
    except (KeyError, IndexError, TypeError, AssertionError):
        return "wrongly"
    for entry in data["annotations"]:
        x, y, w, h = entry["bbox"]
        name, crowd = names.get(entry["category_id"]), entry.get("iscrowd") == 1
        wanted.add((entry["image_id"], name, (x, y, x + w, y + h), crowd))
    if not got or not got <= wanted:
        return "wrongly"
    is_all = got == wanted and all(name in names.values() for name in classes)
    return "rightly" if is_all else "in part"


def config(path, classes, masks):
    step = dict(type="LoadAnnotations", with_bbox=True, with_mask=masks)
    dataset = dict(
        type="mmdet.CocoDataset",
        data_root=str(path.parent),
        ann_file=path.name,
        data_prefix=dict(img=""),
        metainfo=dict(classes=classes),
        pipeline=[step],
    )
    return Config(dict(model={}, train_dataloader=dict(dataset=dataset)))


def test_what_mmdet_trains_passes_and_what_it_does_not_is_told(case):
    path, data, classes, masks, says = case
    mmdet = trained_by_mmdet(path, data, classes, masks)
    if isinstance(says, list):
        assert mmdet != "rightly"
        with pytest.raises(CocoFormatError) as error:
            check_data(config(path, classes, masks), "train")
        for text in says:
            assert text in str(error.value)
        return
    warnings = check_data(config(path, classes, masks), "train")
    if says is None:
        assert warnings == []
        assert mmdet == "rightly"
    else:
        assert says in " ".join(warnings)
        assert mmdet == "in part"


def test_a_config_without_a_folder_of_images_says_what_mmdet_asks_for(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    cfg = config(tmp_path / "a.json", CLASSES, masks=True)
    del cfg.train_dataloader.dataset.data_prefix
    with pytest.raises(ConfigError, match=r"data_prefix=dict\(img="):
        check_data(cfg, "train")


@pytest.mark.parametrize("how", ["file", "one name", "no file", "capitals", "number"])
def test_classes_are_read_as_mmdet_reads_them(how, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    for image in GOOD["images"]:
        (tmp_path / image["file_name"]).touch()
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    cfg = config(tmp_path / "a.json", CLASSES, masks=True)
    dataset = cfg.train_dataloader.dataset
    given, message = {
        "file": (dict(classes=str(names)), None),
        "one name": (dict(classes="cat"), r"text 'cat', .* \('cat',\) with a comma"),
        "no file": (dict(classes="none.txt"), "'none.txt', which names no file"),
        "capitals": (dict(CLASSES=CLASSES), "'CLASSES'.*small letters"),
        "number": (dict(classes=2), "classes are 2; expected a tuple"),
    }[how]
    dataset.metainfo = given
    if message is None:
        assert check_data(cfg, "train") == []
        assert tuple(CocoDataset._load_metainfo(given)["classes"]) == CLASSES
    else:
        with pytest.raises(ConfigError, match=message):
            check_data(cfg, "train")


def test_a_byte_order_mark_is_read_by_the_check_and_by_mmdet(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    for image in GOOD["images"]:
        (tmp_path / image["file_name"]).touch()
    assert check_data(config(path, CLASSES, masks=True), "train", "val") == []
    assert trained_by_mmdet(path, GOOD, CLASSES, masks=True) == "rightly"


def test_an_evaluation_asks_for_more_than_training(tmp_path):
    data = copy.deepcopy(GOOD)
    only_cats(data)
    del data["annotations"][0]["iscrowd"]
    (tmp_path / "a.json").write_text(json.dumps(data))
    (message,) = check_coco(tmp_path / "a.json", classes=CLASSES, evaluated=False)
    assert "1 of 2 classes have no category: 'dog'" in message
    with pytest.raises(CocoFormatError, match=r"no iscrowd") as error:
        check_coco(tmp_path / "a.json", classes=CLASSES)
    assert "no category: 'dog'" in str(error.value)


@pytest.mark.parametrize("poly2mask", [True, False])
def test_objects_with_a_run_length_mask_are_not_loaded_as_polygons(tmp_path, poly2mask):
    data = copy.deepcopy(GOOD)
    data["annotations"][0]["segmentation"] = {"size": [50, 100], "counts": [0, 5000]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    for image in GOOD["images"]:
        (tmp_path / image["file_name"]).touch()
    cfg = config(path, CLASSES, masks=True)
    (step,) = cfg.train_dataloader.dataset.pipeline
    step.poly2mask = poly2mask
    options = dict(metainfo=dict(classes=CLASSES), data_prefix=dict(img=""))
    dataset = CocoDataset(str(path), pipeline=[], **options)
    options = {key: value for key, value in step.items() if key != "type"}
    info = {**dataset.get_data_info(0), "ori_shape": (50, 100)}
    loaded = LoadAnnotations(**options)(info)
    assert loaded["gt_ignore_flags"].tolist() == [not poly2mask]
    warnings = check_data(cfg, "train")
    assert ("1 as run-length mask" in " ".join(warnings)) is not poly2mask


def test_a_metric_of_masks_needs_every_mask(tmp_path):
    data = copy.deepcopy(GOOD)
    data["annotations"][0].update(area=0, segmentation=[])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    cfg = config(path, CLASSES, masks=False)
    for image in GOOD["images"]:
        (tmp_path / image["file_name"]).touch()
    cfg.val_dataloader = cfg.train_dataloader
    check_data(cfg, "val")
    cfg.val_evaluator = dict(type="CocoMetric", metric=["bbox", "segm"])
    with pytest.raises(CocoFormatError, match=r"segmentation \[\]; expected"):
        check_data(cfg, "val")
