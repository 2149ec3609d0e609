"""Tests of the COCO annotation check: what passes, and what each message says."""

import copy
import json

import pytest
from PIL import Image

from mmcastling.data import CocoFormatError, check_coco, coco_check

GOOD = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 100, "height": 50},
        {"id": 2, "file_name": "b.jpg", "width": 60, "height": 60},
    ],
    "annotations": [
        {
            "id": 11,
            "image_id": 1,
            "category_id": 7,
            "bbox": [10, 10, 20, 20],
            "area": 400,
            "iscrowd": 0,
            "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]],
        },
        {
            "id": 12,
            "image_id": 2,
            "category_id": 8,
            "bbox": [0, 0, 60, 60],
            "area": 3600,
            "iscrowd": 1,
            "segmentation": {"size": [60, 60], "counts": [0, 3600]},
        },
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
}


@pytest.fixture
def data():
    return copy.deepcopy(GOOD)


@pytest.fixture
def check(tmp_path):
    """Write data to a file and check it."""

    def run(data, **options):
        path = tmp_path / "instances.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return check_coco(path, **options)

    return run


def test_good_file_passes(check, data):
    assert check(data, classes=("cat", "dog")) == []
    with pytest.raises(CocoFormatError):
        check(data, classes=("dog", "cow"))


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_files_in_the_layout_of_coco_pass(split, tiny_coco):
    path = tiny_coco / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    names = [entry["name"] for entry in content["categories"]]
    assert len(names) == 80
    assert any(entry["iscrowd"] for entry in content["annotations"])
    check_coco(path, image_dir=tiny_coco / split, classes=names)


def test_real_coco_passes(shared_data):
    path = shared_data / "coco_eval_reference" / "instances_val2014_100.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    check_coco(path)


def test_zero_height_box_of_real_coco_train2017_passes(check, data):
    # Annotation 918 of instances_train2017.json.
    data["images"][0].update(width=640, height=640)
    data["annotations"][0].update(
        bbox=[296.65, 388.33, 1.03, 0.0],
        area=0.0,
        segmentation=[[296.65, 388.33, 296.65, 388.33, 297.68, 388.33, 297.68, 388.33]],
    )
    check(data)


def test_missing_file_says_how_to_get_coco(tmp_path):
    with pytest.raises(CocoFormatError) as error:
        check_coco(tmp_path / "instances_val2017.json")
    for part in ("instances_val2017.json", "cocodataset.org", "download_dataset.py"):
        assert part in str(error.value)


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(CocoFormatError, match="is a folder"):
        check_coco(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (json.dumps(GOOD)[:200], "line 1, column.*probably cut off"),
        ('{"images": [\n{"id": 1,}]}', "line 2, column.*Correct that place"),
        ('\ufeff{"images": []}', "no key 'annotations'"),
        ("[]", "holds a list at the top level"),
        ('[{"image_id": 1, "score": 0.5}]', "looks like a file of detection results"),
        ("3", "holds a number at the top level"),
        ("null", "holds a null at the top level"),
    ],
)
def test_unreadable_text(check, text, expected):
    with pytest.raises(CocoFormatError, match=expected):
        check(text)


def test_archive_and_binary_are_recognised(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"PK\x03\x04rest")
    with pytest.raises(CocoFormatError, match="Unpack it first"):
        check_coco(path)
    path.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(CocoFormatError, match="not text at byte 0"):
        check_coco(path)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_missing_or_mistyped_top_level_key(check, data, key):
    with pytest.raises(CocoFormatError, match=f"under '{key}'; expected a list"):
        check({**data, key: {}})
    del data[key]
    with pytest.raises(CocoFormatError, match=f"no key '{key}'"):
        check(data)


def test_no_images(check, data):
    with pytest.raises(CocoFormatError, match="lists no images"):
        check({**data, "images": []})


# One changed entry -> what the message must say: where, what, and what was expected.
BAD_ENTRIES = {
    "category_unknown": (
        ("annotations", 0, "category_id", 9),
        ["(id 11)", "category_id 9", "7, 8"],
    ),
    "image_unknown": (("annotations", 0, "image_id", 5), ["image_id 5", "1, 2"]),
    "image_id_as_text": (("annotations", 0, "image_id", "1"), ["image_id '1'"]),
    "image_id_as_list": (("annotations", 0, "image_id", [1]), ["annotations[0]"]),
    "annotation_id_twice": (("annotations", 1, "id", 11), ["repeats an annotation id"]),
    "image_id_twice": (("images", 1, "id", 1), ["images[1]", "repeats image id 1"]),
    "category_id_twice": (("categories", 1, "id", 7), ["repeats category id 7"]),
    "category_name_twice": (("categories", 1, "name", "cat"), ["repeats the name"]),
    "box_of_three": (("annotations", 0, "bbox", [1, 2, 3]), ["four finite numbers"]),
    "box_null": (("annotations", 0, "bbox", None), ["bbox None", "four finite"]),
    "box_nan": (
        ("annotations", 0, "bbox", [float("nan"), 1, 2, 3]),
        ["nan", "four finite"],
    ),
    "box_infinite": (
        ("annotations", 0, "bbox", [0, 0, float("inf"), 3]),
        ["inf", "four finite"],
    ),
    "box_of_text": (("annotations", 0, "bbox", ["1", "2", "3", "4"]), ["four finite"]),
    "box_negative": (("annotations", 0, "bbox", [9, 9, -3, 5]), ["negative side"]),
    "box_right_of_image": (
        ("annotations", 0, "bbox", [90, 0, 12.1, 5]),
        ["leaves its image of (100, 50)", "2 px", "corners [x1, y1, x2, y2]"],
    ),
    "box_above_image": (("annotations", 0, "bbox", [0, -2.1, 5, 5]), ["leaves its"]),
    "area_missing": (("annotations", 0, "area", ...), ["has no area"]),
    "area_negative": (("annotations", 0, "area", -1), ["area -1"]),
    "iscrowd_missing": (("annotations", 0, "iscrowd", ...), ["no iscrowd", "Write 0"]),
    "iscrowd_two": (("annotations", 0, "iscrowd", 2), ["iscrowd 2", "0 or 1"]),
    "polygon_odd": (
        ("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]),
        ["7 numbers in polygon 0", "even number"],
    ),
    "polygon_too_short": (
        ("annotations", 0, "segmentation", [[1, 2, 3, 4]]),
        ["4 numbers in polygon 0", "at least 6"],
    ),
    "polygon_not_wrapped": (
        ("annotations", 0, "segmentation", [1, 2, 3, 4, 5, 6]),
        ["one more pair of brackets"],
    ),
    "polygon_nan": (
        ("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, float("nan")]]),
        ["not finite numbers"],
    ),
    "polygon_of_text": (
        ("annotations", 0, "segmentation", [["1", "2", "3", "4", "5", "6"]]),
        ["not finite numbers"],
    ),
    "segmentation_text": (("annotations", 0, "segmentation", "abc"), ["has a text"]),
    "rle_without_size": (
        ("annotations", 1, "segmentation", {"counts": [3600]}),
        ["without size"],
    ),
    "rle_without_counts": (
        ("annotations", 1, "segmentation", {"size": [60, 60]}),
        ["without counts"],
    ),
    "rle_of_other_size": (
        ("annotations", 1, "segmentation", {"size": [60, 61], "counts": "abc"}),
        ["size [60, 61]", "[60, 60]"],
    ),
    "rle_too_short": (
        ("annotations", 1, "segmentation", {"size": [60, 60], "counts": [10, 20]}),
        ["sum to 30", "3600"],
    ),
    "rle_counts_null": (
        ("annotations", 1, "segmentation", {"size": [60, 60], "counts": None}),
        ["RLE counts 'None'"],
    ),
    "width_zero": (("images", 0, "width", 0), ["width 0", "positive"]),
    "height_text": (("images", 0, "height", "50"), ["height '50'", "positive"]),
    "width_missing": (("images", 0, "width", ...), ["images[0]", "has no width"]),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_entry_is_named_with_the_expectation(check, data, case):
    (table, index, key, value), expected = BAD_ENTRIES[case]
    if value is ...:
        del data[table][index][key]
    else:
        data[table][index][key] = value
    with pytest.raises(CocoFormatError) as error:
        check(data)
    message = str(error.value)
    assert "instances.json" in message
    for part in expected:
        assert part in message


def test_entry_that_is_no_object(check, data):
    data["annotations"][0] = [1, 2]
    with pytest.raises(CocoFormatError, match=r"annotations\[0\] is a list"):
        check(data)


@pytest.mark.parametrize("box", [[-2, -2, 10, 10], [90, 40, 12, 12], [0, 0, 0, 0]])
def test_box_within_the_rounding_tolerance_passes(check, data, box):
    data["annotations"][0]["bbox"] = box
    check(data)
    data["annotations"][0]["bbox"] = [-2.5, *box[1:]]
    with pytest.raises(CocoFormatError, match=r"-2\.5"):
        check(data)


def test_annotation_without_segmentation_passes(check, data):
    del data["annotations"][0]["segmentation"]
    check(data)


def test_class_without_a_category(check, data):
    with pytest.raises(
        CocoFormatError, match=r"1 of 3 classes have no category: 'cow'"
    ):
        check(data, classes=("cat", "dog", "cow"))


def test_classes_given_as_one_string(check, data):
    with pytest.raises(ValueError, match=r"\('cat',\) with a comma"):
        check(data, classes="cat")


def test_missing_image_folder(check, data, tmp_path):
    with pytest.raises(CocoFormatError, match="no_such_folder does not exist"):
        check(data, image_dir=tmp_path / "no_such_folder")


def test_missing_image_files_are_counted_and_the_first_are_named(check, data, tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jpg").touch()
    (folder / "sub" / "b.jpg").touch()
    with pytest.raises(CocoFormatError, match=r"1 of 2 images are not in .*'b\.jpg'"):
        check(data, image_dir=folder)
    data["images"][1]["file_name"] = "sub/b.jpg"
    check(data, image_dir=folder)


def test_only_the_first_problems_are_spelled_out_and_the_rest_is_counted(check, data):
    template = data["annotations"][0]
    data["annotations"] = [
        {**template, "id": index, "image_id": 99} for index in range(20)
    ]
    with pytest.raises(CocoFormatError) as error:
        check(data)
    message = str(error.value)
    assert "has 20 problems" in message
    assert message.count("image_id 99") == 5
    assert "and 15 more" in message


# -- sizes of the images themselves ----------------------------------------------------


def save_image(path, size, orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


@pytest.mark.parametrize(
    ("size", "orientation", "upright", "said"),
    [
        ((100, 50), 1, True, None),
        ((100, 50), 3, True, None),
        ((100, 50), 6, True, "annotated as 100x50 .* EXIF turns it to 50x100"),
        ((100, 50), 6, False, None),
        ((50, 100), 8, True, None),
        ((50, 100), 8, False, "annotated as 100x50 .* and is 50x100: boxes and masks"),
        ((200, 100), 1, True, "annotated as 100x50 .* and is 200x100: boxes and masks"),
    ],
)
def test_images_are_as_large_as_they_are_annotated(
    check, data, tmp_path, size, orientation, upright, said
):
    save_image(tmp_path / "a.jpg", size, orientation)
    (tmp_path / "b.jpg").write_text("no image, which is for the loader to say")
    options = dict(image_dir=tmp_path, upright=upright)
    if said is None:
        return check(data, **options)
    with pytest.raises(CocoFormatError, match=said):
        check(data, **options)


def test_many_images_are_looked_at_here_and_there(check, data, tmp_path, monkeypatch):
    monkeypatch.setattr(coco_check, "HEADERS", 1)
    save_image(tmp_path / "a.jpg", (100, 50))
    save_image(tmp_path / "b.jpg", (9, 9))
    check(data, image_dir=tmp_path)
    data["images"].reverse()
    with pytest.raises(CocoFormatError, match="annotated as 60x60"):
        check(data, image_dir=tmp_path)
