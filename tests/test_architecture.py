"""The rules of the house: which part may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmcastling

PACKAGE = Path(mmcastling.__file__).parent
ROOT = PACKAGE.parent

# Floors from the ground up. A part may import parts of lower floors, never one of its
# own floor or above.
FLOORS = [
    {"attention", "data", "runtime", "version"},
    {"castle", "checkpoint", "registry", "verbs"},
    {"analysis", "compat", "deploy"},
    {"export", "models", "train"},
    {"show", "weights"},
    {"run"},
]


def floor_of(part):
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def imports_of(path):
    """Modules that a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module


def parts():
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if inside.parts[0] != "__init__.py" and ".mim" not in inside.parts:
            yield inside.parts[0].removesuffix(".py"), path


@pytest.mark.parametrize(
    ("part", "path"), parts(), ids=lambda value: getattr(value, "stem", value)
)
def test_no_arrow_runs_up_or_sideways(part, path):
    for module in imports_of(path):
        if module.startswith("mmcastling."):
            other = module.split(".")[1]
            if other != part:
                assert floor_of(other) < floor_of(part), f"{path} imports {module}"


@pytest.mark.parametrize(
    ("part", "path"), parts(), ids=lambda value: getattr(value, "stem", value)
)
def test_classification_needs_neither_mmdet_nor_mmseg(part, path):
    if part != "compat":
        roots = {module.split(".")[0] for module in imports_of(path)}
        assert not roots & {"mmdet", "mmseg"}


@pytest.mark.parametrize("part", ["attention", "data", "runtime"])
def test_ground_floor_folders_stand_without_openmmlab(part):
    toolboxes = {"mmengine", "mmcv", "mmdet", "mmpretrain", "mmseg"}
    for path in (PACKAGE / part).glob("*.py"):
        assert not {module.split(".")[0] for module in imports_of(path)} & toolboxes


def test_shipped_files_are_short_enough_to_read():
    shipped = [p for p in PACKAGE.rglob("*.py") if ".mim" not in p.parts]
    for path in [*shipped, *(ROOT / "tools").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


@pytest.mark.slow
def test_classification_works_without_mmdet_mmseg_and_timm():
    code = """
import sys
for name in ("mmdet", "mmseg", "timm"):
    sys.modules[name] = None
import mmcastling
from mmpretrain.registry import MODELS
MODELS.build(dict(type="mmcastling.CastlingViT", arch="nano", img_size=32))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
