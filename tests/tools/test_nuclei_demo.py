"""The whole demo as a person runs it, on drawn nuclei and with few iterations."""

import json

import cv2
import numpy as np
import prepare_nuclei
import pytest

from mmcastling.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

ITERATIONS = 8
TILE = (125, 250)  # half a real one, so that testing takes half the time


def drawn_tile(noise):
    """A bright tile with dark round nuclei, and their outlines as polygons."""
    image = np.full((*TILE, 3), (200, 160, 210), np.uint8)
    polygons = []
    for y in range(25, TILE[0], 50):
        for x in range(25, TILE[1], 50):
            centre = np.array([x, y]) + noise.integers(-6, 7, 2)
            size = noise.integers(10, 17, 2)
            outline = cv2.ellipse2Poly(centre.tolist(), size.tolist(), 0, 0, 360, 15)
            cv2.fillPoly(image, [outline], (110, 40, 70))
            polygons.append(outline[:-1].astype(float))  # the last is the first
    noisy = image + noise.normal(0, 6, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), polygons


@pytest.fixture(scope="module")
def drawn_nuclei(tmp_path_factory):
    """A set as prepare_nuclei leaves it, of tiles that are drawn: 6 and 2."""
    folder = tmp_path_factory.mktemp("nuclei")
    (folder / "annotations").mkdir()
    (folder / "LICENSE").write_text("drawn")
    noise = np.random.default_rng(0)
    next_id = 1
    for split, x, tiles in (("train", 0, 6), ("val", 1000, 2)):
        (folder / split).mkdir()
        images, annotations = [], []
        for _ in range(tiles):
            image, polygons = drawn_tile(noise)
            entry = dict(id=next_id, file_name=f"{next_id}.png", slide="drawn")
            entry.update(width=TILE[1], height=TILE[0], x=x, y=TILE[0] * len(images))
            assert cv2.imwrite(str(folder / split / entry["file_name"]), image)
            images.append(entry)
            for polygon in polygons:
                next_id += 1
                low, span = polygon.min(0), np.ptp(polygon, axis=0)
                annotation = dict(id=next_id, image_id=entry["id"], category_id=1)
                annotation["segmentation"] = [polygon.ravel().tolist()]
                annotation["area"] = float(cv2.contourArea(polygon.astype(np.float32)))
                annotation["bbox"] = [*low.tolist(), *span.tolist()]
                annotations.append(dict(annotation, iscrowd=0))
            next_id += 1
        content = dict(images=images, annotations=annotations)
        content["categories"] = prepare_nuclei.CATEGORIES
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    prepare_nuclei.write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def demo(drawn_nuclei, run_command, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("demo") / "run"
    done = run_command(
        *("nuclei_demo.py", "--iters", ITERATIONS),
        *("--data-root", drawn_nuclei, "--work-dir", work_dir),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return work_dir, done.stdout


def test_the_deployed_graph_has_the_training_graph_s_figures(demo):
    work_dir, said = demo
    summary = json.loads((work_dir / "summary.json").read_text())
    trained, deployed = summary["train_graph"], summary["deploy"]
    names = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
    assert [trained[name] for name in names] == [deployed[name] for name in names]
    assert deployed["bbox_mAP_50"] > 0  # it found some
    assert summary["max_abs_diff"] < 1e-4
    # q k^T and P v over 32 x 64 tokens of 128 channels, in four layers.
    assert summary["image_size"] == [256, 512]
    assert trained["macs"] - deployed["macs"] == 4 * 2 * 2048 * 2048 * 128
    density = summary["mask_density"]
    assert density[0] > 0.2 and density[-1] == 0
    assert "pruned the auxiliary softmax branch of 4 attentions" in said
    assert f"{deployed['bbox_mAP']:.3f}" in said and "training" in said


def test_checkpoints_configs_and_pictures_are_written(demo):
    work_dir, _ = demo
    assert load_checkpoint(work_dir / "deployed.pth")["meta"]["deploy"]
    assert "deploy=True" in (work_dir / "deployed.py").read_text()
    last = (work_dir / "last_checkpoint").read_text().strip()
    assert load_checkpoint(last)["meta"]["iter"] == ITERATIONS
    for name in ("mask_density.png", "predictions.png"):
        picture = cv2.imread(str(work_dir / name))
        assert picture.shape[0] > 200 and picture.std() > 10


def test_too_few_iterations_are_refused(drawn_nuclei, run_main, tmp_path):
    done = run_main(
        *("nuclei_demo.py", "--iters", 1, "--data-root", drawn_nuclei),
        *("--work-dir", tmp_path / "run"),
    )
    assert done.returncode == 1 and "--iters 1: give at least 2" in done.stderr
