"""How the command line shows errors: one paragraph for what a person can act on."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import HOOKS, MODELS

import mmcastling.train  # noqa: F401  (registers MaskDecayHook)
from mmcastling.attention import MaskThreshold
from mmcastling.attention.functional import linear_angular_attention
from mmcastling.files import temporary_folder
from mmcastling.run import run_cli


def run(main, capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (lambda: MaskThreshold.parse(2), "error: mask threshold 2.0 is outside [0, 1]"),
        (
            lambda: HOOKS.build(dict(type="MaskDecayHook", begin=0.5, finish=0.4)),
            "error: begin=0.5 is after finish=0.4",
        ),
        (
            lambda: HOOKS.build(dict(type="MaskDecayHook", finsh=0.4)),
            "error: the config cannot be built: MaskDecayHook.__init__() got an "
            "unexpected keyword argument 'finsh'; correct that name",
        ),
        (
            lambda: MODELS.build(dict(type="CastlingVit")),
            "error: the config cannot be built: CastlingVit is not in the",
        ),
    ],
)
def test_what_a_person_can_correct_is_one_paragraph(main, message, capsys):
    code, text = run(main, capsys)
    assert code == 1
    assert text.startswith(message)
    assert text.count("\n") == 1 and "Traceback" not in text


def test_an_error_that_follows_from_ours_is_shown_too(capsys):
    def main():
        try:
            MaskThreshold.parse("x")
        except ValueError as error:
            raise KeyError("class `Detector`: cannot be built") from error

    code, text = run(main, capsys)
    assert code == 1 and "cannot be built" in text


def mismatched_shapes():
    # torch raises this one, though the line that calls it is ours.
    linear_angular_attention(
        torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 9), torch.ones(1, 1, 4, 8)
    )


@pytest.mark.parametrize(
    ("main", "kind"),
    [
        (mismatched_shapes, RuntimeError),
        (lambda: int("x"), ValueError),
        (lambda: {}["x"], KeyError),
        (lambda: len(3), TypeError),
    ],
)
def test_a_defect_keeps_its_traceback(main, kind):
    with pytest.raises(kind):
        run_cli(main)


def test_the_traceback_is_there_on_request(monkeypatch):
    monkeypatch.setenv("MMCASTLING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="outside"):
        run_cli(lambda: MaskThreshold.parse(2))


def test_an_interrupt_ends_with_its_own_status(capsys):
    def main():
        raise KeyboardInterrupt

    code, text = run(main, capsys)
    assert code == 130 and "Traceback" not in text


def test_a_command_that_is_told_to_end_leaves_nothing_unfinished(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def main():
        with temporary_folder(tmp_path / "out.pth"):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    code, text = run(main, capsys)
    assert code == 143 and text == ""
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_command_ends_its_process_group(tmp_path):
    """A process with a group at exit may abort, and its launcher reports failure."""

    def main():
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )

    run_cli(main)
    assert not dist.is_initialized()
