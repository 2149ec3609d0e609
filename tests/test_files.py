"""Files that are written: whole, together, and nothing is left but by a kill."""

import contextlib
import os
import signal

import pytest

from mmcastling.checkpoint import CheckpointError, save_atomically
from mmcastling.files import (
    check_writable,
    remove_leftovers,
    replace_together,
    temporary_folder,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed_in(context):
    """Enter a context in another process, and kill it there."""
    if (child := os.fork()) == 0:
        with context:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_what_a_kill_left_is_removed_by_the_next_who_writes_the_same(tmp_path):
    killed_in(temporary_folder(tmp_path / "a.pth"))
    killed_in(temporary_folder(tmp_path / "b.pth"))
    assert len(names(tmp_path)) == 2
    with temporary_folder(tmp_path / "a.pth") as folder:
        assert len(names(tmp_path)) == 2 and folder.is_dir()
    (left,) = names(tmp_path)
    save_atomically({}, tmp_path / "c.pth")
    assert names(tmp_path) == [left, "c.pth"]
    save_atomically({}, tmp_path / "b.pth")
    assert names(tmp_path) == ["b.pth", "c.pth"]


def test_what_another_is_writing_stays(tmp_path):
    with temporary_folder(tmp_path / "a.pth") as folder:
        (folder / "half").touch()

        def write(file):
            file.write(b"half of it")
            before = names(tmp_path)
            assert remove_leftovers(tmp_path) == []
            assert names(tmp_path) == before and len(before) == 2

        with pytest.raises(CheckpointError):
            write_atomically(tmp_path / "nowhere" / "b", write)
        write_atomically(tmp_path / "b", write)
        assert (folder / "half").exists()
    assert names(tmp_path) == ["b"]


@pytest.fixture
def pair(tmp_path):
    targets = [tmp_path / "out.pth", tmp_path / "out.py"]
    for path in targets:
        path.write_text("old")
    return targets


def test_two_files_are_replaced_together(pair, tmp_path):
    with temporary_folder(pair[0]) as folder:
        for path in pair:
            (folder / path.name).write_text("new")
        replace_together(folder, pair)
    assert [path.read_text() for path in pair] == ["new", "new"]
    assert names(tmp_path) == ["out.pth", "out.py"]


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_or_none_where_one_step_fails(step, after, error, pair, tmp_path, monkeypatch):
    replace, steps = type(pair[0]).replace, []

    def failing(source, target):
        steps.append(target)
        if len(steps) == step + 1:
            if after:
                replace(source, target)
            raise error
        replace(source, target)

    with temporary_folder(pair[0]) as folder, pytest.raises(error):
        for path in pair:
            (folder / path.name).write_text("new")
        monkeypatch.setattr(type(pair[0]), "replace", failing)
        replace_together(folder, pair)
    monkeypatch.undo()
    assert [path.read_text() for path in pair] == ["old", "old"]
    assert names(tmp_path) == ["out.pth", "out.py"]


def test_a_kill_in_between_leaves_no_mixed_pair(pair, tmp_path, monkeypatch):
    replace = type(pair[0]).replace

    class Killed(BaseException):
        pass

    for count in range(5):  # so many of the four steps are done
        folder = tmp_path / f"steps-{count}"
        folder.mkdir()
        places = [folder / path.name for path in pair]
        for path in places:
            path.write_text("old")
        fresh = folder / "fresh"
        fresh.mkdir()
        for path in places:
            (fresh / path.name).write_text("new")
        done = []

        def dying(source, target, count=count, done=done):
            if len(done) == count:
                raise Killed
            done.append(replace(source, target))

        with monkeypatch.context() as patch:
            patch.setattr(type(pair[0]), "replace", dying)
            # What would undo it is dead as well.
            with contextlib.suppress(Killed):
                replace_together(fresh, places)
        assert {p.read_text() for p in places if p.exists()} in (
            *({"old"}, {"new"}, set()),
        )


def test_where_nothing_can_be_written_is_said(tmp_path):
    for path, text in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "a.png", "does not exist, create it first"),
        (tmp_path / "a.jpg", "end the name in .png"),
    ):
        with pytest.raises(ValueError, match=text):
            check_writable(path, *([".png"] if "jpg" in path.name else []))
