"""COCO evaluation by either library, against the official reference and each other."""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS, DefaultScope

from mmcastling.compat.coco_eval import fast_coco_eval

faster_is_installed = pytest.mark.skipif(
    importlib.util.find_spec("faster_coco_eval") is None,
    reason="faster-coco-eval is not installed",
)
LIBRARIES = [
    pytest.param("pycocotools"),
    pytest.param("faster-coco-eval", marks=faster_is_installed),
]
# The names that mmdet gives to pycocotools' twelve numbers, in their order. Those of
# the recalls are for its own limits: the first is AR@1 where the limits are 1, 10, 100.
ITEMS = ["mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"]
ITEMS += ["AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000"]


@pytest.fixture(scope="module")
def reference(shared_data):
    """COCO's fake detections of 100 images, and what its authors' code says of them."""
    folder = shared_data / "coco_eval_reference"
    if not folder.is_dir():
        pytest.skip(f"no coco_eval_reference in {shared_data}")
    text = (folder / "val2014_fake_eval_res.txt").read_text()
    numbers = {
        block.split()[0]: [float(number) for number in re.findall(r"\] = (\S+)", block)]
        for block in text.split("type=")[1:]
    }
    assert {kind: len(numbers[kind]) for kind in ("bbox", "segm")} == dict(
        bbox=12, segm=12
    )
    return folder, numbers


def evaluate(library, ann_file, samples, **options):
    """What the commands do after their last batch; returns metrics and what ran."""
    import mmdet.evaluation  # noqa: F401, registers the metric

    data = json.loads(ann_file.read_text())
    with DefaultScope.overwrite_default_scope("mmdet"):
        metric = METRICS.build(
            dict(type="CocoMetric", ann_file=str(ann_file), **options)
        )
    metric.dataset_meta = dict(classes=[c["name"] for c in data["categories"]])
    evaluator = Evaluator(metric)
    evaluator.process(data_samples=samples)
    enabled = library != "pycocotools"
    with fast_coco_eval(evaluator.metrics, enabled) as name:
        metrics = evaluator.evaluate(len(samples))
    assert name.startswith(library)
    return metrics


def fake_predictions(folder, kind):
    """The fake detections as a detector returns them."""
    from pycocotools import mask as mask_utils

    annotations = json.loads((folder / "instances_val2014_100.json").read_text())
    labels = {c["id"]: i for i, c in enumerate(annotations["categories"])}
    results = json.loads(
        (folder / f"instances_val2014_fake{kind}100_results.json").read_text()
    )
    for image in annotations["images"]:
        found = [one for one in results if one["image_id"] == image["id"]]
        boxes = [
            one["bbox"] if kind == "bbox" else mask_utils.toBbox(one["segmentation"])
            for one in found
        ]
        boxes = torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float64)
        boxes[:, 2:] += boxes[:, :2]
        instances = dict(
            bboxes=boxes,
            scores=torch.tensor([one["score"] for one in found], dtype=torch.float64),
            labels=torch.tensor([labels[one["category_id"]] for one in found]).long(),
        )
        if kind == "segm":
            instances["masks"] = [
                dict(one["segmentation"], counts=one["segmentation"]["counts"].encode())
                for one in found
            ]
        yield dict(
            img_id=image["id"],
            ori_shape=(image["height"], image["width"]),
            pred_instances=instances,
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_official_numbers_are_met(library, kind, reference):
    folder, numbers = reference
    metrics = evaluate(
        library,
        folder / "instances_val2014_100.json",
        list(fake_predictions(folder, kind)),
        metric=[kind],
        proposal_nums=(1, 10, 100),
        metric_items=ITEMS,
    )
    assert [metrics[f"coco/{kind}_{item}"] for item in ITEMS] == numbers[kind]


# -- more detections than the headline counts ------------------------------------------


@pytest.fixture
def crowded(tmp_path):
    """An image with 150 boxes of a class and 300 detections, right ones last."""
    noise = np.random.default_rng(0)
    corners = noise.uniform(0, 500, (150, 2))
    boxes = np.concatenate([corners, noise.uniform(8, 120, (150, 2))], 1)
    annotations = [
        dict(id=i + 1, image_id=1, category_id=1, iscrowd=0, bbox=box.tolist())
        | dict(area=float(box[2] * box[3]), segmentation=[])
        for i, box in enumerate(boxes)
    ]
    path = tmp_path / "crowded.json"
    images = [dict(id=1, height=640, width=640, file_name="a.jpg")]
    categories = [dict(id=1, name="thing")]
    path.write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    found = np.concatenate([boxes, boxes + noise.normal(0, 6, boxes.shape)])
    found[:, 2:] += found[:, :2]
    instances = dict(
        bboxes=torch.tensor(found),
        scores=torch.tensor(noise.uniform(0.05, 1, 300)),
        labels=torch.zeros(300, dtype=torch.long),
    )
    sample = dict(img_id=1, ori_shape=(640, 640), pred_instances=instances)
    return path, [sample]


@faster_is_installed
def test_the_headline_counts_a_hundred_detections_with_either_library(crowded, capfd):
    options = dict(metric=["bbox", "proposal"], metric_items=ITEMS, classwise=True)
    one = evaluate("pycocotools", *crowded, **options)
    capfd.readouterr()
    other = evaluate("faster-coco-eval", *crowded, **options)
    assert other == one
    # All detections are counted from the second number on.
    assert one["coco/bbox_AR@100"] < one["coco/bbox_AR@300"]
    assert f"maxDets=100 ] = {one['coco/bbox_mAP']:.3f}" in capfd.readouterr().out


def test_without_the_library_pycocotools_evaluates(crowded, monkeypatch):
    expected = evaluate("pycocotools", *crowded)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    path, samples = crowded
    metric = METRICS.build(dict(type="mmdet.CocoMetric", ann_file=str(path)))
    metric.dataset_meta = dict(classes=["thing"])
    evaluator = Evaluator(metric)
    evaluator.process(data_samples=samples)
    with fast_coco_eval([metric]) as name:
        assert evaluator.evaluate(1) == expected
    assert name.startswith("pycocotools ")


@faster_is_installed
def test_the_metric_is_as_before_afterwards(crowded):
    from mmdet.evaluation.metrics import coco_metric
    from pycocotools.cocoeval import COCOeval

    evaluate("faster-coco-eval", *crowded)
    assert coco_metric.COCOeval is COCOeval


def test_other_metrics_are_none_of_its_business():
    with fast_coco_eval([object()]) as name:
        assert name == ""
