"""Alignment: a castled network comes to compute what its softmax original computes."""

import copy
import logging

import cv2
import known_models
import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from mmcastling import castle, castling_modules, set_mask, switch_to_deploy
from mmcastling.alignment import (
    AlignError,
    PictureBatches,
    align,
    aligning,
    attention_errors,
    attention_pairs,
    feature_similarity,
    scan,
    scanning,
)
from mmcastling.alignment.pairs import blocks_of, cosines, outputs_of
from mmcastling.alignment.scanning import ScanRow, choose_kept
from mmcastling.castle import RECOMMENDED
from mmcastling.checkpoint import load_checkpoint
from mmcastling.decay import MaskDecay

SIZE = 32


def trained_network():
    """A small ViT whose attention is sharp and whose keys have a common offset."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=SIZE,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,
    ).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
        torch.nn.init.normal_(block.attn.qkv.bias, std=1.0)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.3)
    return model


def castled(teacher, **options):
    options = dict(form="learned", center_keys=True, mask_threshold="4/N") | options
    torch.manual_seed(1)  # of the convolution, which is new
    return castle(copy.deepcopy(teacher), **options)


def images(step):
    noise = torch.Generator().manual_seed(step)
    coarse = torch.randn(4, 3, 4, 4, generator=noise)
    return torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic")


HELD_OUT = [images(1000), images(1001)]


@pytest.fixture(scope="module")
def teacher():
    return trained_network()


@pytest.fixture(scope="module")
def aligned(teacher):
    student = castled(teacher)
    before = copy.deepcopy(teacher.state_dict())
    align(student, teacher, images, steps=(60, 40), learning_rates=(3e-3, 1e-3))
    assert_close(teacher.state_dict(), before, atol=0, rtol=0)
    return student


def test_attentions_and_features_come_close(teacher, aligned):
    start = switch_to_deploy(castled(teacher))
    end = switch_to_deploy(aligned)
    first, last = (attention_errors(s, teacher, HELD_OUT) for s in (start, end))
    assert list(first) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(last[name] < 0.9 * first[name] for name in first)
    (cosine,), (untrained,) = (
        feature_similarity(s, teacher, HELD_OUT) for s in (end, start)
    )
    assert 1 - cosine < 0.5 * (1 - untrained)


def test_the_second_stage_matches_what_blocks_give(teacher):
    student, names = (
        castled(teacher),
        blocks_of(attention_pairs(castled(teacher), teacher)),
    )
    assert names == ["blocks.0", "blocks.1"]

    def distances():
        given = []
        for model in (student, teacher):
            with torch.no_grad(), outputs_of(model, names) as found:
                model(HELD_OUT[0])
            given.append(found)
        ours, theirs = given
        return [1 - cosines(ours[name], theirs[name]).mean().item() for name in names]

    def nothing(model, x):  # so that blocks alone have a gradient
        return 0 * model.forward_features(x)

    set_mask(student, 1.0)
    before = distances()
    options = dict(steps=(0, 30), learning_rates=(1e-3, 1e-3))
    align(student, teacher, images, features=nothing, **options)
    assert all(b < 0.8 * a for a, b in zip(before, distances(), strict=True))


def test_cosines_are_of_channels_in_maps_of_either_layout():
    found, expected = torch.randn(2, 2, 6, 4, 8).unbind(0)
    wanted = torch.cosine_similarity(found, expected, dim=-1)
    assert_close(cosines(found, expected, {8}), wanted)  # as of timm's Swin
    turned = (tensor.permute(0, 3, 1, 2) for tensor in (found, expected))
    assert_close(cosines(*turned, {8}), wanted)
    # A width of the network is the channels even where the map is as wide.
    assert_close(cosines(found, expected, {6, 8}), cosines(found, expected))


def test_features_of_timms_swin_are_compared_by_channels():
    teacher = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
        num_classes=0,
    ).eval()
    student = castled(teacher)
    set_mask(student, 1.0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = (m.eval().forward_features(x) for m in (student, teacher))
    assert ours.shape[-1] == 32  # (B, H, W, C)
    (found,) = feature_similarity(student, teacher, [x])
    expected = torch.cosine_similarity(ours, theirs, dim=-1).mean().item()
    assert found == pytest.approx(expected, abs=1e-5)
    assert found != pytest.approx(torch.cosine_similarity(ours, theirs).mean().item())


@pytest.mark.parametrize(
    ("attention", "block"),
    [
        ("stages.1.blocks.2.attn.w_msa", ["stages.1.blocks.2"]),
        ("encoder.layer.0.attention.attention", ["encoder.layer.0"]),
        ("0", ["0"]),
        ("attn", []),
    ],
)
def test_the_block_of_an_attention_is_its_nearest_place_in_a_list(attention, block):
    assert blocks_of({attention: None}) == block


def test_masks_are_off_and_deploying_changes_nothing(aligned):
    assert not any(module.mask_is_on for _, module in castling_modules(aligned))
    expected = aligned(HELD_OUT[0])
    assert_close(switch_to_deploy(aligned)(HELD_OUT[0]), expected, atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in aligned.parameters())


def test_the_first_stage_trains_attentions_alone(teacher):
    student = castled(teacher)
    before = copy.deepcopy(student.state_dict())
    align(student, teacher, images, steps=(2, 0))
    changed = {
        n for n, v in student.state_dict().items() if not torch.equal(v, before[n])
    }
    assert changed
    assert all(".attn." in name for name in changed)
    assert "blocks.0.attn.mixer.gain" in changed


@pytest.mark.parametrize("gains", [True, False])
def test_layers_compute_in_bfloat16_where_it_may_gain(
    teacher, tmp_path, monkeypatch, gains
):
    monkeypatch.setattr(aligning, "may_gain", lambda precision, device: gains)
    seen = []
    student = castled(teacher)
    student.blocks[0].attn.qkv.register_forward_hook(
        lambda layer, inputs, output: seen.append(output.dtype)
    )
    align(student, teacher, images, steps=(0, 1), folder=tmp_path)
    assert set(seen) == {torch.bfloat16 if gains else torch.float32}
    assert load_checkpoint(tmp_path / "align.pth")["settings"]["amp"] is gains


def test_what_the_teacher_lacks_learns_thirty_times_as_fast(teacher):
    student = castled(teacher)
    before = copy.deepcopy(student.state_dict())
    align(student, teacher, images, steps=(1, 0), learning_rates=(1e-4, 1e-4))
    moved = {n: (v - before[n]).abs().max() for n, v in student.state_dict().items()}
    # The first step of Adam has the length of the learning rate, nearly.
    for name, rate in (("qkv.weight", 1e-4), ("mixer.gain", 3e-3)):
        assert moved[f"blocks.1.attn.{name}"] == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize("killed_at", [2, 3, 5])
def test_it_goes_on_where_it_was_killed(teacher, tmp_path, killed_at):
    options = dict(steps=(4, 4), save_every=2)
    whole = align(castled(teacher), teacher, images, **options)

    def dying(step):
        if step == killed_at:
            raise KeyboardInterrupt
        return images(step)

    with pytest.raises(KeyboardInterrupt):
        align(castled(teacher), teacher, dying, folder=tmp_path, **options)
    seen = []

    def watched(step):
        seen.append(step)
        return images(step)

    found = align(castled(teacher), teacher, watched, folder=tmp_path, **options)
    assert seen == list(range(killed_at // 2 * 2, 8))
    assert_close(found.state_dict(), whole.state_dict(), atol=0, rtol=0)
    with pytest.raises(
        AlignError, match=r"is of an alignment with .*'steps': \[4, 4\]"
    ):
        align(castled(teacher), teacher, images, steps=(4, 5), folder=tmp_path)


def test_an_error_that_is_not_finite_stops_and_is_named(teacher, tmp_path):
    broken = copy.deepcopy(teacher)
    broken.blocks[1].attn.proj.weight.data[0, 0] = float("nan")
    student = castled(teacher)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(
        AlignError, match=r"stage 1, step 1: the error of blocks\.1\.attn"
    ):
        align(student, broken, images, steps=(2, 2), folder=tmp_path)
    assert_close(student.state_dict(), before, atol=0, rtol=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (lambda t: copy.deepcopy(t), {}, "has no castled attention"),
        (lambda t: castled(t), dict(steps=(0, 0)), r"steps \(0, 0\)"),
        (lambda t: castled(t), dict(steps=(-1, 2)), r"steps \(-1, 2\)"),
        (lambda t: castled(t), dict(steps=(1,)), r"steps \(1,\)"),
        (lambda t: castled(t), dict(steps=(1.0, 1)), r"steps \(1\.0, 1\)"),
        (lambda t: castled(t), dict(learning_rates=(0, 1)), r"learning rates \(0, 1\)"),
        (
            lambda t: castled(t),
            dict(learning_rates=(1e-4, float("nan"))),
            r"learning rates \(0\.0001, nan\)",
        ),
        (lambda t: castled(t), dict(save_every=0), "save_every=0"),
        (lambda t: castled(t), dict(log_every=0), "log_every=0"),
        (lambda t: castled(t), dict(images=[images(0)]), "images is a list"),
        (lambda t: switch_to_deploy(castled(t)), {}, "of the student is deployed"),
        (lambda t: castled(t), dict(teacher=castled), "of the teacher is castled, too"),
        (
            lambda t: castled(t),
            dict(mask=MaskDecay(end=0.5)),
            "masks would still be on in the end",
        ),
    ],
)
def test_what_cannot_be_aligned(teacher, student, options, message):
    options = dict(images=images, teacher=copy.copy) | options
    original, batches = options.pop("teacher")(teacher), options.pop("images")
    network = student(teacher)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises((AlignError, ValueError), match=message):
        align(network, original, batches, **options)
    assert_close(network.state_dict(), before, atol=0, rtol=0)


def test_networks_that_do_not_belong_together(teacher):
    student = castled(teacher)
    with pytest.raises(AlignError, match=r"has no blocks\.1\.attn"):
        attention_pairs(student, torch.nn.ModuleDict({"blocks": teacher.blocks[:1]}))
    wider = copy.deepcopy(teacher)
    wider.blocks[1].attn.proj = torch.nn.Linear(32, 48)
    with pytest.raises(
        AlignError, match=r"blocks\.1\.attn\.proj\.weight has shape \(32, 32\) in"
    ):
        attention_pairs(student, wider)
    sharing = copy.copy(teacher)
    sharing._modules = dict(teacher._modules)
    sharing.blocks = student.blocks
    with pytest.raises(AlignError, match=r"share .* weights, which would train"):
        attention_pairs(sharing, teacher)


@pytest.mark.parametrize(
    ("batches", "rounds"), [([], 1), (HELD_OUT, 0)], ids=["no batch", "no round"]
)
def test_a_scan_of_nothing_is_refused(teacher, batches, rounds):
    with pytest.raises(ValueError, match="give at least one of each"):
        scan(castled(teacher), teacher, batches, rounds=rounds)


@pytest.mark.parametrize("where", ["weights", "pictures"])
def test_what_is_not_finite_is_not_chosen_by(teacher, where):
    broken, pictures = copy.deepcopy(teacher), [HELD_OUT[0].clone()]
    broken_part = (
        broken.blocks[1].attn.qkv.weight if where == "weights" else pictures[0]
    )
    broken_part.data[0, 0] = float("nan")
    with pytest.raises(AlignError, match=r"with blocks\.0\.attn castled, features are"):
        castle(broken, keep="auto", budget=1, images=pictures)


@pytest.mark.parametrize("budget", [0, 2, True, 1.0, "2"])
def test_a_budget_is_looked_at_before_anything_is_scanned(teacher, budget, monkeypatch):
    monkeypatch.setattr(scanning, "scan", None)
    with pytest.raises(ValueError, match=f"budget={budget!r}: "):
        castle(copy.deepcopy(teacher), keep="auto", budget=budget, images=HELD_OUT)


def test_a_scan_finds_the_attention_that_matters(teacher):
    rows = scan(castled(teacher), teacher, HELD_OUT, rounds=1)
    assert [row.name for row in rows] == ["blocks.0.attn", "blocks.1.attn"]
    for row in rows:
        assert 0 < row.damage < 2
        assert row.softmax_ms > 0 and row.castled_ms > 0
        assert row.saved_ms == row.softmax_ms - row.castled_ms
    # One whose output is nothing cannot do damage.
    quiet = copy.deepcopy(teacher)
    for parameter in quiet.blocks[0].attn.proj.parameters():
        torch.nn.init.zeros_(parameter)
    first, second = scan(castled(quiet), quiet, HELD_OUT, rounds=1)
    assert abs(first.damage) < 1e-6 < second.damage


def test_windows_are_aligned_with_what_cuts_them():
    teacher = known_models.build("mmdet-swin")
    student = castle(copy.deepcopy(teacher), form="learned", local_conv=None)
    pairs = attention_pairs(student, teacher)
    assert next(iter(pairs)) == "stages.0.blocks.0.attn" and len(pairs) == 4
    set_mask(student, 1.0)
    batches = [known_models.images((64, 64))]
    first = attention_errors(student, teacher, batches)
    align(student, teacher, lambda step: batches[0], steps=(12, 0))
    last = attention_errors(student, teacher, batches)
    assert all(0 < last[name] < first[name] for name in pairs)


def rows_of(*pairs):
    return [ScanRow(f"{i}", d, 10 + ms, 10) for i, (d, ms) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (1, ["2"]),  # the most harmful one
        (2, ["2", "0"]),
        (0.85, ["0"]),  # of 20 ms, 3 may be given up: most harm per millisecond
        (0.5, ["0", "2"]),
        (0.95, None),
        (4, None),
        (0, None),
        (1.0, None),
        (True, None),
        ("2", None),
    ],
)
def test_a_budget_keeps_what_harms_most_for_what_it_saves(budget, kept):
    rows = rows_of((0.2, 2.0), (0.01, 8.0), (0.5, 8.0), (0.001, 2.0))
    if kept is None:
        with pytest.raises(ValueError, match=f"budget={budget!r}"):
            choose_kept(rows, budget)
    else:
        assert choose_kept(rows, budget) == kept


def test_castle_keeps_by_itself_what_matters(teacher):
    quiet = copy.deepcopy(teacher)
    for parameter in quiet.blocks[0].attn.proj.parameters():
        torch.nn.init.zeros_(parameter)
    options = dict(keep="auto", form="learned", return_report=True)
    model, report = castle(quiet, budget=1, images=HELD_OUT, **options)
    assert report.left_alone == {"blocks.1.attn": "kept"}
    assert type(model.blocks[1].attn) is type(teacher.blocks[1].attn)
    with pytest.raises(ValueError, match="needs images"):
        castle(copy.deepcopy(teacher), **options)


def test_our_own_softmax_network_is_castled_and_aligned():
    from mmcastling.models import CastlingViT

    arch = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48)
    options = dict(img_size=32, patch_size=8, out_type="featmap", with_cls_token=False)
    torch.manual_seed(0)
    own = CastlingViT(arch, attention=dict(type="softmax"), **options)
    ours = castle(copy.deepcopy(own))
    built = CastlingViT(arch, attention=RECOMMENDED, **options)
    built.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 48, 32)
    assert_close(ours.eval()(x), built.eval()(x))
    assert list(attention_pairs(ours, own)) == ["layers.0.attn", "layers.1.attn"]


# -- pictures --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for index, shape in enumerate([(40, 60), (90, 50), (20, 20)]):
        picture = noise.integers(0, 255, (*shape, 3), np.uint8)
        (tmp_path / "sub").mkdir(exist_ok=True)
        assert cv2.imwrite(str(tmp_path / "sub" / f"{index}.png"), picture)
    return tmp_path


def test_a_step_has_the_same_pictures_whenever_it_is_asked_for(folder):
    batches = PictureBatches(folder, sizes=[(24, 32), (32, 24)], batch_size=2)
    first = batches(0)
    assert first.shape == (2, 3, 24, 32) and batches(1).shape == (2, 3, 32, 24)
    assert_close(batches(0), first, atol=0, rtol=0)
    assert not torch.equal(batches(2), first)
    again = PictureBatches(folder, sizes=[(24, 32)], batch_size=2)
    assert_close(again(0), first, atol=0, rtol=0)
    assert not torch.equal(
        PictureBatches(folder, sizes=[(24, 32)], batch_size=2, seed=1)(0), first
    )


def test_colours_are_red_green_blue_and_normalised(tmp_path):
    assert cv2.imwrite(str(tmp_path / "red.png"), np.full((9, 9, 3), (0, 0, 255.0)))
    (image,) = PictureBatches(
        tmp_path, [(4, 4)], batch_size=1, mean=(5, 0, 0), std=(10, 1, 1)
    )(0)
    assert_close(image[:, 0, 0], torch.tensor([25.0, 0, 0]))


def test_damaged_pictures_are_skipped_and_named_once(folder, caplog):
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    with caplog.at_level(logging.WARNING, "mmcastling"):
        batches = PictureBatches(folder, sizes=[(8, 8)], batch_size=4)
        for step in range(3):
            assert batches(step).shape == (4, 3, 8, 8)
    for name in ("bad.jpg", "empty.png", "folder.png"):
        assert caplog.text.count(f"{name} cannot be read as a picture") == 1
    for path in (folder / "empty.png", *(folder / "sub").iterdir()):
        path.unlink()
    (folder / "folder.png").rmdir()
    with pytest.raises(AlignError, match=r"no picture that can be read \(1 files"):
        PictureBatches(folder)
    with pytest.raises(AlignError, match="no picture that can be read"):
        PictureBatches(folder / "missing")


def test_a_part_is_held_out(folder):
    batches = PictureBatches(folder, sizes=[(8, 8)], batch_size=2)
    most, rest = batches.split(0.3)
    assert len(most.paths) == 2 and len(rest.paths) == 1
    assert {*most.paths, *rest.paths} == {*batches.paths}
    assert rest.batch(0, (8, 12)).shape == (2, 3, 8, 12)
    with pytest.raises(AlignError, match="only picture"):
        rest.split(0.5)
    with pytest.raises(ValueError, match="batch_size 0"):
        PictureBatches(folder, batch_size=0)
