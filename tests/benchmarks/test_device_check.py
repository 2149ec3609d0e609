"""benchmarks/device_check.py on a CPU: right is told from wrong, and bad input."""

import json

import pytest
import torch


@pytest.fixture
def device_check(load_benchmark):
    return load_benchmark("device_check")


def run(device_check, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["device_check.py", *map(str, words)])
    device_check.main()


@pytest.fixture
def one_form(device_check, monkeypatch):
    form = "castling, learned form"
    monkeypatch.setattr(device_check, "FORMS", {form: device_check.FORMS[form]})


@pytest.mark.long
def test_everything_is_right_on_a_cpu_and_is_stored(
    device_check, one_form, monkeypatch, tmp_path, capsys
):
    path = tmp_path / "cpu.json"
    parts = ("--parts", "correctness", "layers", "models")
    run(device_check, monkeypatch, "--device", "cpu", "--quick", *parts, "--json", path)
    facts = json.loads(path.read_text())
    assert len(facts["correctness"]) == 9
    for name, cell in facts["correctness"].items():
        assert cell["error"] <= cell["limit"], name
    assert {"softmax", "linear", "linear, compiled"} < set(
        facts["layers"]["196 tokens"]
    )
    assert set(facts["models"]) == {"ViT-S at 224x224"}
    assert "WRONG" not in capsys.readouterr().out


def test_what_is_wrong_is_listed_and_ends_with_1(
    device_check, one_form, monkeypatch, capsys
):
    pair = device_check.attention_pair

    def slightly_off(options, device):
        exact, ours = pair(options, device)
        with torch.no_grad():
            ours.proj.weight.mul_(1.001)
        return exact, ours

    monkeypatch.setattr(device_check, "attention_pair", slightly_off)
    with pytest.raises(SystemExit) as ended:
        run(
            device_check,
            monkeypatch,
            "--device",
            "cpu",
            "--quick",
            "--parts",
            "correctness",
        )
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "wrong on this device:\ncastling, learned form, masks at 0.0: " in printed


def test_no_time_is_left_for_what_is_large(device_check, monkeypatch, tmp_path):
    path = tmp_path / "cpu.json"
    options = ("--device", "cpu", "--quick", "--parts", "layers", "--seconds", 0)
    run(device_check, monkeypatch, *options, "--json", path)
    assert json.loads(path.read_text())["layers"] == {
        "196 tokens": "left out: no time",
        "1024 tokens": "left out: no time",
    }


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda:99", "'cuda:99' is not there"), ("gpu", "'gpu' is not there")],
)
def test_a_device_that_is_not_there_is_named(device_check, monkeypatch, device, words):
    with pytest.raises(device_check.OptionError, match=words):
        run(device_check, monkeypatch, "--device", device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(device_check, monkeypatch):
    with pytest.raises(device_check.UnavailableError, match="--device cpu --quick"):
        run(device_check, monkeypatch)
