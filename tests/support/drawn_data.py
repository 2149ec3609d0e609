"""Pictures that stand in for COCO and CamVid on a machine that has neither.

They are drawn from a seed, equal on each run, in the layout, formats and classes of the
real sets, so that the same tests run on both: JPEG files of noise and shapes, an
annotation file with polygons of several parts and crowds in run lengths, and label maps
with every class and void.
"""

import json
from pathlib import Path

import cv2
import numpy as np

# Ids that COCO left out, so that a category's id is not its index.
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = [number for number in range(1, 91) if number not in _UNUSED_IDS]
PERSON = 1


def draw_coco(folder: Path, **splits: int) -> Path:
    """Draw a detection set with COCO's 80 categories in COCO's layout.

    Args:
        folder: Where ``<split>2017/`` and ``annotations/`` go.
        **splits: How many pictures each split gets, such as ``train=16``.
    """
    from mmdet.datasets import CocoDataset

    meta = CocoDataset.METAINFO
    names = dict(zip(COCO_IDS, meta["classes"], strict=True))
    colours = dict(zip(COCO_IDS, meta["palette"], strict=True))
    (folder / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(2017)
    image_id = annotation_id = 0
    for split, count in splits.items():
        images, annotations = [], []
        (folder / f"{split}2017").mkdir()
        for index in range(count):
            image_id += int(rng.integers(100, 9000))
            height, width = [(240, 320), (300, 225), (213, 320)][index % 3]
            picture = _background(rng, height, width)
            # Two in three show persons, every fourth a crowd of them.
            persons = int(rng.integers(1, 5)) if index % 3 != 2 else 0
            others = rng.choice(COCO_IDS[1:], int(rng.integers(1, 5))).tolist()
            for category in others + [PERSON] * persons:
                polygons = _draw_object(rng, picture, category, colours[category])
                annotation_id += 1
                annotations.append(
                    dict(
                        _polygon_fields(polygons),
                        **dict(id=annotation_id, image_id=image_id),
                        category_id=category,
                    )
                )
            if index % 4 == 0:
                annotation_id += 1
                annotations.append(
                    dict(
                        _draw_crowd(rng, picture, colours[PERSON]),
                        **dict(id=annotation_id, image_id=image_id),
                        category_id=PERSON,
                    )
                )
            name = f"{image_id:012}.jpg"
            assert cv2.imwrite(str(folder / f"{split}2017" / name), picture)
            images.append(dict(id=image_id, file_name=name, width=width, height=height))
        content = dict(
            images=images,
            annotations=annotations,
            categories=[dict(id=key, name=name) for key, name in names.items()],
        )
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))
    return folder


def draw_camvid(folder: Path, **splits: int) -> Path:
    """Draw road scenes of 480x360 with label maps of CamVid's 11 classes and void.

    Args:
        folder: Where ``images/<split>/`` and ``annotations/<split>/`` go.
        **splits: How many frames each split gets, such as ``train=8``.
    """
    rng = np.random.default_rng(11)
    for split, count in splits.items():
        for index in range(count):
            frame, label = _draw_scene(rng)
            for kind, suffix, pixels in (
                ("images", "jpg", frame),
                ("annotations", "png", label),
            ):
                path = folder / kind / split / f"{split}_{index:05}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                assert cv2.imwrite(str(path), pixels)
    return folder


def _background(rng, height, width):
    """A picture ``(H, W, 3)`` of coarse blotches under fine noise."""
    coarse = rng.integers(40, 200, (6, 8, 3)).astype(np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = rng.normal(0, 12, (height, width, 3))
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def _fill(rng, picture, corners, colour):
    """Fill a polygon of corners ``(P, 2)`` with a rough colour."""
    x, y, width, height = cv2.boundingRect(corners)
    window = picture[max(y, 0) : y + height, max(x, 0) : x + width]
    inside = np.zeros(window.shape[:2], np.uint8)
    cv2.fillPoly(inside, [corners - (max(x, 0), max(y, 0))], 1)
    rough = np.clip(np.asarray(colour) + rng.normal(0, 18, window.shape), 0, 255)
    np.copyto(window, rough.astype(np.uint8), where=inside[..., None] > 0)


def _blob(rng, centre, radii, corners=12):
    """Corners ``(corners, 2)`` of a bent ellipse."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    reach = rng.uniform(0.75, 1.0, (corners, 1))
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.asarray(centre) + circle * reach * np.asarray(radii)


def _draw_object(rng, picture, category, colour):
    """Draw an object; its polygons, of which a person has two: body and head."""
    height, width = picture.shape[:2]
    side = rng.uniform(14, 60)
    x, y = rng.uniform(0.1, 0.9, 2) * (width, height)
    if category == PERSON:
        body = _blob(rng, (x, y), (side / 2, side))
        head = _blob(rng, (x, y - 1.4 * side), (side / 3, side / 3), corners=8)
        shapes = [body, head]
    else:
        shapes = [_blob(rng, (x, y), side * rng.uniform(0.5, 1.2, 2))]
    polygons = []
    for shape in shapes:
        corners = np.clip(shape.round(), 0, (width - 1, height - 1)).astype(np.int32)
        if cv2.contourArea(corners) >= 20:  # the rest lies outside the picture
            _fill(rng, picture, corners, colour)
            polygons.append(corners)
    return polygons


def _polygon_fields(polygons):
    corners = np.concatenate(polygons)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return dict(
        iscrowd=0,
        bbox=[float(value) for value in (*low, *(high - low))],
        area=float(sum(cv2.contourArea(polygon) for polygon in polygons)),
        segmentation=[polygon.ravel().astype(float).tolist() for polygon in polygons],
    )


def _draw_crowd(rng, picture, colour):
    """Draw many small persons in a corner; the fields of their one annotation."""
    height, width = picture.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    for _ in range(10):
        centre = rng.uniform((10, 10), (width / 3, height / 4))
        corners = _blob(rng, centre, (4, 8), corners=8).round().astype(np.int32)
        _fill(rng, picture, corners, colour)
        cv2.fillPoly(mask, [corners], 1)
    column_wise = mask.T.ravel()
    edges = np.flatnonzero(np.diff(column_wise)) + 1
    bounds = [0, *edges.tolist(), column_wise.size]
    runs = np.diff(bounds).tolist()
    if column_wise[0]:
        runs.insert(0, 0)  # run lengths begin with background
    return dict(
        iscrowd=1,
        bbox=[float(value) for value in cv2.boundingRect(mask)],
        area=float(mask.sum()),
        segmentation=dict(size=[height, width], counts=runs),
    )


# Class ids and colours (BGR) of a road scene, the far things first.
_SKY, _BUILDING, _POLE, _ROAD, _PAVEMENT, _TREE = range(6)
_SIGN, _FENCE, _CAR, _PEDESTRIAN, _BICYCLIST, _VOID = range(6, 12)
_COLOURS = [
    *((230, 200, 160), (90, 100, 130), (70, 70, 70), (95, 90, 90)),
    *((150, 150, 165), (60, 120, 50), (40, 60, 200), (90, 120, 140)),
    *((150, 60, 40), (60, 60, 190), (170, 90, 150), (20, 20, 20)),
]


def _draw_scene(rng):
    """A frame ``(360, 480, 3)`` and its label map ``(360, 480)``."""
    frame = _background(rng, 360, 480)
    label = np.full((360, 480), _SKY, np.uint8)

    def paint(kind, *corners):
        corners = np.asarray(corners).round().astype(np.int32)
        _fill(rng, frame, corners, _COLOURS[kind])
        cv2.fillPoly(label, [corners], kind)

    def box(kind, x, y, width, height):
        far_x, far_y = x + width, y + height
        paint(kind, (x, y), (far_x, y), (far_x, far_y), (x, far_y))

    box(_SKY, 0, 0, 480, 200)
    horizon = rng.integers(160, 190)
    for x in range(0, 480, 80):
        tall = rng.integers(40, 130)
        box(_BUILDING, x, horizon - tall, 70, tall)
    box(_PAVEMENT, 0, horizon, 480, 360 - horizon)
    middle = rng.integers(200, 280)
    paint(_ROAD, (middle - 30, horizon), (middle + 30, horizon), (460, 360), (20, 360))
    paint(_TREE, *_blob(rng, (rng.integers(20, 120), horizon - 40), (50, 60)))
    box(_FENCE, 330, horizon - 10, 150, 40)
    pole = rng.integers(120, 180)
    box(_POLE, pole, horizon - 110, 9, 150)
    box(_SIGN, pole - 14, horizon - 110, 36, 30)
    box(_CAR, middle + rng.integers(-40, 20), horizon + 20, 80, 50)
    paint(_PEDESTRIAN, *_blob(rng, (rng.integers(40, 90), horizon + 40), (14, 45)))
    paint(_BICYCLIST, *_blob(rng, (rng.integers(390, 440), horizon + 60), (24, 45)))
    box(_VOID, 0, 335, 480, 25)  # the bonnet of the car that films
    return frame, label
