"""The study: paired runs, resuming, its page, and a cell of it end to end."""

import importlib
import json
import sys
from collections import Counter
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

SMALL = ["--train-images", "128", "--test-images", "64", "--epochs", "2"]


@pytest.fixture(scope="module")
def study(root):
    """The study's modules, by name."""
    sys.path.insert(0, str(root))
    try:
        yield lambda name: importlib.import_module(f"benchmarks.study.{name}")
    finally:
        sys.path.remove(str(root))


@pytest.fixture
def run_table(study, data, tmp_path):
    """Run a table of the study on a few pictures."""

    def run(table, *options):
        folders = ["--out", tmp_path / "out", "--work-dir", tmp_path / "weights"]
        arguments = [table, "--data-root", data, *folders, *SMALL, *options]
        study("__main__").main([str(argument) for argument in arguments])

    return run


def cell_number(study, name, seed=0):
    """``--part`` for one run of table (a)."""
    variants = study("variants")
    runs = variants.table_runs("a", variants.Recipe())
    found = [i for i, r in enumerate(runs, 1) if (r.name, r.seed) == (name, seed)]
    return f"{found[0]}/{len(runs)}"


# -- a cell, end to end ----------------------------------------------------------------


@pytest.mark.slow
def test_a_cell_is_trained_pruned_stored_and_not_repeated(
    study, run_table, tmp_path, capsys
):
    part = cell_number(study, "decay")
    run_table("a", "--part", part)
    (path,) = (tmp_path / "out").rglob("*.json")
    assert path.relative_to(tmp_path / "out").as_posix() == "fashion/decay-seed0.json"
    stored = json.loads(path.read_text())
    result, settings = stored["result"], stored["settings"]
    assert settings["recipe"]["train_images"] == 128 and settings["seed"] == 0
    assert settings["model"]["backbone"]["attention"]["type"] == "castling"
    assert str(tmp_path) not in path.read_text()
    assert result["accuracy"] > 40  # of two classes, after four steps
    assert result["accuracy"] == result["accuracy_before"]
    assert result["changed_by_pruning"] == 0
    curve = result["curve"]
    assert curve["step"] == [0, 1, 2, 3]
    assert curve["threshold"][0] == 0.02 and curve["threshold"][-1] == 1
    assert curve["density"][0] > 0 and curve["density"][-1] == 0
    assert result["params"] > 0 and result["macs"] == result["macs_before"]

    before = path.stat().st_mtime_ns
    run_table("a", "--part", part)
    assert path.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("decay-seed0") == 2


@pytest.mark.slow
def test_what_starts_from_trained_weights_trains_them_once(study, run_table, tmp_path):
    # The softmax network is the first that table (d) finetunes.
    run_table("d", "--part", "2/12")
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.json")}
    assert names == {"finetune/softmax-seed0.json", "fashion/softmax-seed0.json"}
    weights = list((tmp_path / "weights").rglob("*.pth"))
    assert len(weights) == 1
    before = weights[0].stat().st_mtime_ns
    for part in ("3/12", "4/12"):  # castled, on labels and taught
        run_table("d", "--part", part)
    assert weights[0].stat().st_mtime_ns == before
    labels, taught = (
        json.loads((out / f"finetune/{name}-seed0.json").read_text())["result"]
        for name in ("labels", "taught")
    )
    assert labels["accuracy_castled"] == taught["accuracy_castled"]
    assert labels["curve"]["loss"][0] != taught["curve"]["loss"][0]


@pytest.mark.slow
def test_repeating_a_run_gives_the_same_result(study, data, tmp_path):
    variants, fashion = study("variants"), study("fashion")
    recipe = variants.Recipe(train_images=128, test_images=64, epochs=1)
    pictures = fashion.Data(data, recipe)
    run = variants.train_run("decay", 1, recipe)
    results = []
    for name in ("one", "two"):
        store = study("store").Store(tmp_path / name)
        trainer = fashion.Trainer(pictures, recipe, store, tmp_path / "weights")
        result = trainer.carry_out(run)
        result.pop("train_cpu_seconds")
        results.append(result)
    assert results[0] == results[1]


@pytest.fixture
def tiny_nuclei(tmp_path):
    """Bright discs on a dark ground, in the layout of the nuclei set."""
    root = tmp_path / "nuclei"
    noise = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 1)):
        (root / split).mkdir()
        content = dict(
            images=[], annotations=[], categories=[dict(id=1, name="nucleus")]
        )
        for i in range(count):
            image = noise.integers(0, 60, (125, 250, 3), dtype=np.uint8)
            name = f"{i}.png"
            for x in range(35, 230, 60):
                for y in (35, 95):
                    cv2.circle(image, (x, y), 8, (220, 220, 220), -1)
                    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
                    outline = np.stack(
                        [x + 8 * np.cos(angles), y + 8 * np.sin(angles)], axis=1
                    )
                    content["annotations"].append(
                        dict(
                            id=len(content["annotations"]) + 1,
                            image_id=i,
                            category_id=1,
                            bbox=[x - 8, y - 8, 16, 16],
                            area=200,
                            iscrowd=0,
                            segmentation=[outline.flatten().round(2).tolist()],
                        )
                    )
            cv2.imwrite(str(root / split / name), image)
            content["images"].append(dict(id=i, file_name=name, width=250, height=125))
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return root


@pytest.mark.slow
@pytest.mark.long
def test_a_detector_cell_is_trained_pruned_and_stored(study, tiny_nuclei, tmp_path):
    out = tmp_path / "out"
    nuclei = study("nuclei")
    runs = nuclei.table_runs(4)
    number = [run.name for run in runs].index("decay") + 1
    options = ["--data-root", tiny_nuclei, "--out", out, "--iterations", "4"]
    options += ["--part", f"{number}/{len(runs)}"]
    study("__main__").main(["nuclei", *map(str, options)])
    (path,) = out.rglob("*.json")
    stored = json.loads(path.read_text())
    assert path.name == "decay-seed0.json" and str(tmp_path) not in path.read_text()
    config = stored["settings"]["config"]
    assert config["model"]["backbone"]["attention"]["mask_threshold"] == "1/N"
    assert config["data_root"] == nuclei.DATA_ROOT
    result = stored["result"]
    assert result["before"] == result["after"]  # the masks had decayed
    assert {"bbox_mAP_50", "segm_mAP_50"} <= result["after"].keys()
    assert result["curve"]["mask_density"][-1] == 0
    assert result["backbone_macs"] > 5e8


def test_all_detectors_of_a_seed_start_from_the_same_weights(study, tmp_path):
    from mmengine.registry import MODELS

    nuclei = study("nuclei")
    shared = None
    for name in nuclei.ATTENTIONS:
        cfg = nuclei.config(name, 1, 8, nuclei.DATA_ROOT, str(tmp_path))
        assert cfg.randomness.seed == 1
        assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters == 8
        model = MODELS.build(cfg.model)
        attention = type(model.backbone.layers[0].attn.mixer).__name__
        assert attention == {
            "softmax": "SoftmaxMixer",
            "performer": "PerformerMixer",
            "decay": "CastlingMixer",
        }.get(name, "LinearAngularMixer")
        start = {key: cfg.custom_hooks[0][key] for key in ("seed", "model")}
        hook = nuclei.SharedStartHook(**start)
        hook.before_train(SimpleNamespace(model=model))
        drawn = torch.rand(3)
        weights = model.state_dict()
        if shared is None:
            shared, first = weights, drawn  # plain softmax is the first
        assert torch.equal(drawn, first)  # and training draws alike from there
        for key, value in shared.items():
            assert torch.equal(weights[key], value), (name, key)
        hooks = [hook["type"] for hook in cfg.custom_hooks]
        assert ("MaskDecayHook" in hooks) == (name == "decay")


# -- never mixed -----------------------------------------------------------------------


def test_changed_settings_are_refused_before_anything_is_computed(
    study, data, tmp_path, monkeypatch
):
    variants, command = study("variants"), study("__main__")
    ConfigError = command.ConfigError
    store = study("store").Store(tmp_path)
    # The last run of the table: the first ones would be trained before it is met.
    run = variants.table_runs("a", variants.Recipe())[-1]
    store.save(run, dict(accuracy=50.0))
    monkeypatch.setattr(command.Trainer, "carry_out", lambda *_: pytest.fail("ran"))
    options = ["a", "--data-root", str(data), "--out", str(tmp_path), "--epochs", "7"]
    with pytest.raises(ConfigError) as error:
        command.main(options)
    message = str(error.value)
    assert str(store.path(run)) in message
    assert "recipe.epochs was 4, is 7" in message
    assert "mix results" in message and "--out FOLDER" in message
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_a_detector_study_of_other_length_is_refused(study, tmp_path):
    nuclei, store = study("nuclei"), study("store").Store(tmp_path)
    store.save(nuclei.run_of("decay", 0, 8), {})
    with pytest.raises(ValueError, match=r"max_iters was 8, is 16"):
        store.check([nuclei.run_of("decay", 0, 16)])


def test_a_damaged_result_is_named(study, tmp_path):
    variants, store = study("variants"), study("store").Store(tmp_path)
    run = variants.train_run("softmax", 0, variants.Recipe())
    store.path(run).parent.mkdir(parents=True)
    store.path(run).write_text('{"settings":')
    with pytest.raises(ValueError, match=r"softmax-seed0.json is no result"):
        store.load(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "0/2"], "--part '0/2': expected K/N"),
        (["--epochs", "0"], "--epochs 0 must be above 0"),
        (["--train-images", "63"], "less than a batch of 64"),
        (["--warm-up", "1"], "--warm-up 1.0 must be a fraction below 1"),
    ],
    ids=["part", "epochs", "images", "warm up"],
)
def test_bad_options_are_named(study, data, tmp_path, options, message):
    folder = ["--data-root", str(data), "--out", str(tmp_path / "out")]
    small = ["--test-images", "64"]
    if "--train-images" not in options:
        small += ["--train-images", "128"]
    with pytest.raises(ValueError) as error:
        study("__main__").main(["a", *folder, *small, *options])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


# -- paired ----------------------------------------------------------------------------


def test_all_variants_of_a_seed_start_from_the_same_weights(study):
    variants, fashion = study("variants"), study("fashion")
    shared = None
    for name, variant in variants.VARIANTS.items():
        model = fashion.initialised(variant.model(), variant.window, seed=3)
        weights = {
            key.replace(".msa.w_msa.", "."): value
            for key, value in model.state_dict().items()
        }
        shared = shared or weights  # plain softmax is the first
        for key, value in shared.items():
            assert torch.equal(weights[key], value), (name, key)
    other = fashion.initialised(variants.VARIANTS["softmax"].model(), 0, seed=4)
    assert not torch.equal(
        other.state_dict()["head.fc.weight"], shared["head.fc.weight"]
    )


def test_all_variants_of_a_seed_see_the_same_batches(study, data, monkeypatch):
    variants, fashion = study("variants"), study("fashion")
    recipe = variants.Recipe(train_images=128, test_images=64, epochs=2)
    pictures = fashion.Data(data, recipe)

    def batches(name, seed):
        variant = variants.VARIANTS[name]
        model = fashion.initialised(variant.model(), variant.window, seed)
        seen, loss = [], model.loss

        def spy(inputs, samples):
            seen.append((inputs.clone(), [int(s.gt_label) for s in samples]))
            return loss(inputs, samples)

        monkeypatch.setattr(model, "loss", spy)
        fashion.train(model, pictures, recipe, variant.hook, seed, 2, 1e-3)
        return seen

    performer, full, other = (
        batches("performer", 0),
        batches("decay", 0),
        batches("decay", 1),
    )
    assert len(performer) == len(full) == 4
    for (images, labels), (same_images, same_labels) in zip(
        performer, full, strict=True
    ):
        assert torch.equal(images, same_images) and labels == same_labels
    assert not torch.equal(full[0][0], full[1][0])
    assert not torch.equal(full[0][0], other[0][0])


def test_swin_attends_within_windows_that_shift(study):
    variants, fashion = study("variants"), study("fashion")
    swin = variants.VARIANTS["swin"]
    model = fashion.initialised(swin.model(), swin.window, seed=0)
    x = torch.randn(1, 64, variants.WIDTH)
    changed = x.clone()
    changed[0, 0] += 1.0  # the upper left token
    reached = []
    for layer in model.backbone.layers:
        difference = layer.attn(changed, (8, 8)) - layer.attn(x, (8, 8))
        reached.append(difference.abs().sum(2).view(8, 8) > 1e-6)
    window = torch.zeros(8, 8, dtype=torch.bool)
    window[:4, :4] = True
    assert torch.equal(reached[0], window)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:2, :2] = True  # what a shift by two leaves it
    assert torch.equal(reached[1], corner)


def test_masks_follow_the_shipped_hook(study):
    from mmcastling.train import MaskDecayHook
    from mmcastling.verbs import castling_modules

    variants, fashion = study("variants"), study("fashion")
    for name, states in {
        "decay": [("0.02", 1.0), ("1", 1.0)],
        "fade-0.5": [("0.02", 1.0), ("0.02", 0.0)],
        "fixed": [("0.02", 1.0), ("0.02", 1.0)],
        "penalty": [("0.02", 1.0), ("0.02", 1.0)],
    }.items():
        variant = variants.VARIANTS[name]
        model = fashion.build(variant.model())
        hook = MaskDecayHook(**variant.hook)
        for step, expected in zip((0, 99), states, strict=True):
            fashion.apply_masks(model, hook, step, 100)
            for _, module in castling_modules(model):
                state = str(module.branch.threshold), module.branch.weight
                assert state == expected
                assert bool(module.branch.penalty) == (name == "penalty")


def test_reference_tokens_matters_only_away_from_the_trained_size(study, data):
    variants, fashion = study("variants"), study("fashion")
    recipe = variants.Recipe(train_images=128, test_images=64)
    pictures = fashion.Data(data, recipe)
    model = fashion.initialised(variants.VARIANTS["decay"].model(), 0, seed=0)
    model = fashion.switch_to_deploy(model).eval()
    mixers = [m for m in model.modules() if isinstance(m, fashion.LinearAngularMixer)]
    assert len(mixers) == 2
    image = pictures.test.images[:4].float() / 255
    for scale, equal in ((1, True), (2, False)):
        outputs = []
        for reference in (None, variants.TOKENS):
            for mixer in mixers:
                mixer.reference_tokens = reference
            larger = torch.nn.functional.interpolate(image, scale_factor=scale)
            outputs.append(model(larger))
        assert torch.allclose(*outputs, atol=1e-6) == equal


# -- statistics ------------------------------------------------------------------------


def test_intervals_are_students(study):
    statistics = study("statistics")
    found = statistics.interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.count == 3
    assert found.half == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert found.verdict == 0
    assert statistics.interval([2.0, 2.1, 2.2]).verdict == 1
    assert statistics.interval([-2.0, -2.1, -2.2]).verdict == -1
    assert statistics.interval([9.0]).verdict == 0  # one seed shows nothing


def test_differences_are_paired_by_seed(study):
    statistics = study("statistics")
    one, other = {0: 10.0, 1: 20.0, 2: 31.0, 9: 99.0}, {2: 30.0, 1: 19.0, 0: 9.0}
    found = statistics.paired(one, other)
    assert (found.mean, found.half, found.count) == (1.0, 0.0, 3)
    assert found.verdict == 1
    assert statistics.paired(one, {5: 1.0}) is None


# -- the page --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(study):
    command = study("__main__")
    return study("report").Study(
        study("store").Store(command.RESULTS),
        study("variants").Recipe(),
        command.ITERATIONS,
    )


def test_page_is_generated_from_the_stored_runs(study, stored):
    assert study("report").PAGE.read_text() == stored.page()


def test_page_says_how_many_runs_are_missing(study, stored):
    tables = (stored.a, stored.b, stored.c, stored.d, stored.nuclei)
    missing = {str(run) for table in tables for run in table.missing}
    text = study("report").PAGE.read_text()
    assert ("runs are not stored yet" in text) == bool(missing)
    if missing:
        assert f"**{len(missing)} runs are not stored yet**" in text


def test_seeds_are_as_many_as_promised(study):
    variants, nuclei = study("variants"), study("nuclei")
    recipe = variants.Recipe()
    runs = variants.table_runs("a", recipe)
    counts = Counter(run.name for run in runs)
    main = ("softmax", "performer", "angular", "decay")
    assert {name for name, count in counts.items() if count == 5} == set(main)
    assert set(counts.values()) == {3, 5} and len(counts) == 12
    for table in "bcd":
        runs = variants.table_runs(table, recipe)
        assert len({str(run) for run in runs}) == len(runs)
        assert min(Counter(run.name for run in runs).values()) == 3
    detectors = Counter(run.name for run in nuclei.table_runs(nuclei.ITERATIONS))
    assert set(detectors.values()) == {3}
    assert set(detectors) == {*main, "angular-conv"}


def test_pruning_a_branch_that_is_off_changed_nothing(stored):
    for name, runs in stored.b.found.items():
        if name.startswith(("decay", "fade")):
            assert all(run["changed_by_pruning"] == 0 for run in runs.values())
            assert all(run["curve"]["density"][-1] == 0 for run in runs.values())


def test_verdicts_follow_the_intervals(study):
    results = study("results")
    values = {0: 80.0, 1: 81.0, 2: 82.0}
    lower = {0: 70.0, 1: 71.1, 2: 72.0}
    near = {0: 79.0, 1: 82.0, 2: 82.0}
    comparisons = [
        results.Comparison.of("full", "weak", values, lower),
        results.Comparison.of("full", "near", values, near),
        results.Comparison.of("full", "absent", values, {}),
        results.Comparison.of("full", "two seeds", values, {0: 1.0, 1: 2.0}),
    ]
    assert [c.verdict for c in comparisons] == [
        "higher",
        "not told apart",
        "not measured",
        "not measured",
    ]
    assert results.sentence("Full", comparisons) == (
        "Full is above weak; it cannot be told apart from near; it was not measured "
        "against absent and two seeds."
    )
