"""What the doctor measures, and what it concludes."""

import json

import pytest
import torch
from torch import nn

import mmcastling
from mmcastling.analysis import Diagnosis, Measured, Stage
from mmcastling.analysis.examination import _crossing
from mmcastling.castle import CastleReport
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.show.figures import plot_latency


def vit(**options):
    kind = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    size = dict(img_size=64, num_classes=5, dynamic_img_size=True)
    return kind(embed_dim=24, depth=2, num_heads=3, **{**size, **options})


def measured(*times, first=100, asked=True):
    """Sizes with 1, 2, ... times as many pixels."""
    return [
        Measured(
            (first, first * (n + 1)),
            asked,
            pair,
            (8, 4),
            (2, 1),
            {0: Stage(1, 9, 1, [4, 2], 0.5, 0.25)},
        )
        for n, pair in enumerate(times)
    ]


def diagnosis(*times):
    report = CastleReport("castling", castled=[], num_kept=3)
    found = measured(*times)
    machine = dict(device="CPU", threads=1, torch="2")
    return Diagnosis("Model", machine, report, found, _crossing(found))


def test_a_model_is_measured_and_left_alone(tmp_path):
    model = vit()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = mmcastling.doctor(model, [(64, 64), (64, 96)], keep=[-1])
    torch.testing.assert_close(model.state_dict(), before)
    assert [(m.size, m.asked) for m in found.measured[:2]] == [
        ((64, 64), True),
        ((64, 96), True),
    ]
    largest = found.largest
    assert largest.size == (64, 96) and min(largest.milliseconds) > 0
    (stage,) = largest.stages.values()  # the other attention is kept
    assert (stage.attentions, stage.tokens, stage.windows) == (1, 25, 1)
    # qkv, proj, and both products of tokens with tokens
    assert stage.macs[0] == 25 * 24 * 24 * 4 + 2 * 25 * 25 * 24
    assert stage.share_of_macs == stage.macs[0] / largest.macs[0]
    assert 0 < stage.share_of_time < 1
    assert found.verdict in str(found) and "left alone" in str(found)
    facts = json.loads(json.dumps(found.to_json()))
    assert facts["verdict"] == found.verdict and len(facts["measured"]) >= 2
    plot_latency(found, tmp_path / "x.png", "small")
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("times", "pixels"),
    [
        ([(1, 2), (4, 2), (8, 2)], 10_000 * 2**0.5),
        ([(2, 1), (4, 2)], 0.0),
        ([(2, 1), (1, 2)], None),
        ([(2, 1), (1, 2), (1, 1), (2, 1)], 30_000),  # the last one counts
    ],
)
def test_the_crossing_lies_between_the_sizes(times, pixels):
    found = _crossing(measured(*times))
    assert found == (pixels if not pixels else pytest.approx(pixels))


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([(1, 2), (4, 2)], ["castle this: at 100x200 it is 2.0", "faster from about"]),
        ([(4, 2)], ["castle this", "at every size measured"]),
        ([(2, 1), (2, 4)], ["do not castle this", "slower", "at no size up to"]),
        ([(1, 2), (102, 100)], ["do not castle this", "1.02 times as fast", "25%"]),
    ],
)
def test_the_verdict_is_a_sentence(times, words):
    found = diagnosis(*times)
    assert all(word in found.verdict for word in words), found.verdict
    assert found.pays is found.verdict.startswith("castle")


def test_bad_input():
    with pytest.raises(OptionError, match=r"size \(0, 64\): give a height"):
        mmcastling.doctor(vit(), [(0, 64)])
    fixed = vit(dynamic_img_size=False)
    with pytest.raises(OptionError, match=r"refuses an image of 96x96: .*height"):
        mmcastling.doctor(fixed, [(64, 64), (96, 96)])
    with pytest.raises(UnavailableError, match="do not castle this: castle knows no"):
        mmcastling.doctor(nn.Sequential(nn.Conv2d(3, 4, 1)), [(64, 64)])


def test_a_busy_machine_is_warned_of():
    found = diagnosis((2, 1), (4, 1))
    assert not found.busy and "busy" not in str(found)
    found.machine["load"] = 1000.0
    assert "warning: the machine was busy (load 1000.0 on" in str(found)
