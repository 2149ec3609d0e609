"""The shell scripts: they parse, say how they are used, and hand on their arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mmcastling.run.training import CPU_ENVIRONMENT

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SOURCED = TOOLS / "cpu_environment.sh"
SCRIPTS = sorted(set(TOOLS.rglob("*.sh")) - {SOURCED})


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


# What comes before the arguments that are handed on.
USAGE = {
    "dist_train.sh": ("c.py", "4"),
    "dist_test.sh": ("c.py", "w.pth", "4"),
    "slurm_train.sh": ("gpu", "job", "c.py"),
    "slurm_test.sh": ("gpu", "job", "c.py", "w.pth"),
}


@pytest.fixture
def fake_path(tmp_path):
    """Stand-ins that print their arguments for the programs that scripts start."""
    for name in ("torchrun", "srun"):
        program = tmp_path / name
        program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        program.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def script_named(name):
    (script,) = [path for path in SCRIPTS if path.name == name]
    return script


def environment_of(name, path, **environment):
    """What a launch script exports, seen from the launcher."""
    stub = Path(path.split(os.pathsep)[0]) / "torchrun"
    stub.write_text("#!/usr/bin/env bash\nenv\n")
    result = run("bash", script_named(name), *USAGE[name], PATH=path, **environment)
    return dict(line.split("=", 1) for line in result.stdout.splitlines())


@pytest.fixture
def no_settings(monkeypatch):
    for name in ("OMP_NUM_THREADS", *CPU_ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["dist_train.sh", "dist_test.sh"])
def test_cpus_get_their_settings(name, fake_path, no_settings):
    found = environment_of(name, fake_path)
    assert found.items() >= CPU_ENVIRONMENT.items()
    assert found["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 4))
    own = environment_of(name, fake_path, OMP_NUM_THREADS="3", MALLOC_TOP_PAD_="1")
    assert (own["OMP_NUM_THREADS"], own["MALLOC_TOP_PAD_"]) == ("3", "1")
    assert own["MALLOC_MMAP_MAX_"] == "0"


def test_gpus_are_left_alone(fake_path, no_settings):
    gpu = Path(fake_path.split(os.pathsep)[0]) / "nvidia-smi"
    gpu.write_text("#!/usr/bin/env bash\nexit 0\n")
    gpu.chmod(0o755)
    found = environment_of("dist_train.sh", fake_path)
    assert not {"OMP_NUM_THREADS", *CPU_ENVIRONMENT} & found.keys()


def test_every_script_is_here():
    assert {script.name for script in SCRIPTS} == USAGE.keys()


@pytest.mark.parametrize("name", USAGE)
def test_missing_arguments_are_a_usage_error(name, fake_path):
    script = script_named(name)
    for count in range(len(USAGE[name])):
        result = run("bash", script, *USAGE[name][:count], PATH=fake_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"usage: {script} ")
        names = result.stderr.split("[arguments of")[0].split()[2:]
        assert len(names) == len(USAGE[name]) and all(n.isupper() for n in names)


@pytest.mark.parametrize("name", USAGE)
def test_arguments_reach_the_tool(name, fake_path):
    script = script_named(name)
    handed_on = ("--resume", "a b", "")
    result = run("bash", script, *USAGE[name], *handed_on, PATH=fake_path)
    lines = result.stdout.splitlines()
    launcher = "slurm" if name.startswith("slurm") else "pytorch"
    tool = script.with_name(name.split("_")[1].replace(".sh", ".py"))
    files = [value for value in USAGE[name] if "." in value]
    expected = [str(tool), *files, "--launcher", launcher, *handed_on]
    assert tool.is_file() and lines[-len(expected) :] == expected


@pytest.mark.parametrize("name", ["dist_train.sh", "dist_test.sh"])
def test_machines_reach_torchrun(name, fake_path):
    place = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", PORT="29700")
    result = run("bash", script_named(name), *USAGE[name], PATH=fake_path, **place)
    assert result.stdout.splitlines()[:5] == [
        "--nnodes=2",
        "--node_rank=1",
        "--master_addr=10.0.0.1",
        "--master_port=29700",
        "--nproc_per_node=4",
    ]


@pytest.mark.parametrize("name", ["slurm_train.sh", "slurm_test.sh"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            ["--gres=gpu:8", "--ntasks=8", "--ntasks-per-node=8", "--cpus-per-task=5"],
        ),
        ({"GPUS": "4"}, ["--gres=gpu:4", "--ntasks=4", "--ntasks-per-node=4"]),
        (
            {"GPUS": "16", "GPUS_PER_NODE": "4", "CPUS_PER_TASK": "2"},
            ["--gres=gpu:4", "--ntasks=16", "--ntasks-per-node=4", "--cpus-per-task=2"],
        ),
        ({"GRES": "none", "GPUS": "2"}, ["--gres=none", "--ntasks=2"]),
        (
            {"SRUN_ARGS": "--time=1:00:00 --qos=low"},
            ["--time=1:00:00", "--qos=low", "--kill-on-bad-exit=1"],
        ),
    ],
    ids=["default", "few", "machines", "cpu", "further"],
)
def test_settings_reach_srun(name, settings, expected, fake_path):
    result = run("bash", script_named(name), *USAGE[name], PATH=fake_path, **settings)
    lines = result.stdout.splitlines()
    assert lines[:2] == ["--partition=gpu", "--job-name=job"]
    assert set(expected) <= set(lines[: lines.index("python")])


@pytest.mark.parametrize(
    ("name", "settings", "gpus", "message"),
    [
        ("dist_train.sh", {}, "0", "GPUS must be a number of processes, got '0'"),
        ("dist_test.sh", {}, "two", "GPUS must be a number of processes, got 'two'"),
        ("dist_train.sh", {"NNODES": "x"}, "2", "NNODES must be a number of machines"),
        ("dist_train.sh", {"NNODES": "2"}, "2", "NNODES=2 needs MASTER_ADDR"),
        ("dist_test.sh", {"NODE_RANK": "1"}, "2", "from 0 to NNODES - 1 = 0, got '1'"),
        ("dist_train.sh", {"PORT": "http"}, "2", "PORT must be a free port, got"),
        ("slurm_train.sh", {"GPUS": "-1"}, None, "GPUS must be a number of tasks"),
        (
            "slurm_test.sh",
            {"GPUS": "12"},
            None,
            "12 is not a multiple of GPUS_PER_NODE",
        ),
        ("slurm_train.sh", {"GPUS_PER_NODE": "9"}, None, "from 1 to GPUS = 8, got '9'"),
        ("slurm_test.sh", {"CPUS_PER_TASK": "0"}, None, "CPUS_PER_TASK must be"),
    ],
)
def test_settings_that_cannot_be_are_named(name, settings, gpus, message, fake_path):
    arguments = USAGE[name] if gpus is None else (*USAGE[name][:-1], gpus)
    result = run("bash", script_named(name), *arguments, PATH=fake_path, **settings)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "program"), [("dist_train.sh", "torchrun"), ("slurm_test.sh", "srun")]
)
def test_a_missing_launcher_is_named(name, program, tmp_path):
    for needed in ("bash", "dirname"):
        (tmp_path / needed).symlink_to(shutil.which(needed))
    script = script_named(name)
    result = run("bash", script, *USAGE[name], PATH=str(tmp_path))
    assert result.returncode == 2
    assert f"{program} was not found" in result.stderr
