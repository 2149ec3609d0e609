"""The shell scripts: they parse, say how they are used, and hand on their arguments."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "tools").rglob("*.sh"))


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_can_be_started(script):
    result = run("bash", "-n", script)
    assert (result.returncode, result.stderr) == (0, "")
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
@pytest.mark.parametrize("arguments", [(), ("config.py",)])
def test_missing_arguments_are_a_usage_error(script, arguments):
    result = run("bash", script, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"usage: {script} CONFIG ")


@pytest.mark.parametrize(
    ("name", "arguments", "handed_on"),
    [
        ("dist_train.sh", ("c.py", "4", "--resume", "a b"), ("c.py", "--resume")),
        ("dist_test.sh", ("c.py", "w.pth", "4", "--out", "a b"), ("c.py", "w.pth")),
    ],
)
def test_arguments_reach_torchrun(name, arguments, handed_on, tmp_path):
    fake = tmp_path / "torchrun"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    (script,) = [path for path in SCRIPTS if path.name == name]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    lines = run("bash", script, *arguments, PATH=path, NNODES="2").stdout.splitlines()
    assert {"--nproc_per_node=4", "--nnodes=2", "pytorch", "a b"} <= set(lines)
    assert set(handed_on) <= set(lines)
    tool = script.with_name(name.removeprefix("dist_").replace(".sh", ".py"))
    assert str(tool) in lines and tool.is_file()
