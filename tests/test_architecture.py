"""The rules of the house: which part may import which, and what each may need."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

import mmcastling

PACKAGE = Path(mmcastling.__file__).parent
ROOT = PACKAGE.parent

# Floors from the ground up. A part may import parts of lower floors, never one of its
# own floor or above.
FLOORS = [
    {"errors", "version"},
    {"attention", "data", "files", "runtime"},
    {"castle", "checkpoint", "decay", "verbs"},
    {"analysis", "compat"},
    {"deploy"},
    {"alignment", "export", "models", "named_models", "train"},
    {"show", "weights"},
    {"run"},
]
# MMEngine looks for it at its path; it is compat's.
PART_OF = {"registry": "compat"}

# What torch alone is enough for. The others, and compat but for what `import
# mmcastling` reads of it, know the toolboxes.
FIRST_HALF = {
    *("alignment", "analysis", "attention", "castle", "checkpoint", "decay", "deploy"),
    *("errors", "export", "files", "named_models", "runtime", "verbs", "version"),
}
OPENMMLAB = {"mmengine", "mmcv", "mmdet", "mmpretrain", "mmseg"}
NEIGHBOURS = ("timm", "transformers")

# Written to be read, and for tests to compare with what is fast.
ORACLES = {"angular_attention", "angular_similarity_series"}


def floor_of(part):
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def part_of(module):
    part = module.split(".")[1]
    return PART_OF.get(part, part)


def imports_of(path):
    """Modules that a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            if node.module == "mmcastling":  # of a part, perhaps
                yield from (f"mmcastling.{alias.name}" for alias in node.names)


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if ".mim" not in path.parts and path != PACKAGE / "__init__.py"
]
FIRST_HALF_FILES = [
    PACKAGE / "__init__.py",
    PACKAGE / "compat" / "__init__.py",
    PACKAGE / "compat" / "on_import.py",
    *(path for path in FILES if part_of(name_of(path)) in FIRST_HALF),
]
every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@every_file
def test_no_arrow_runs_up_or_sideways(path):
    own = part_of(name_of(path))
    for module in imports_of(path):
        if module.startswith("mmcastling."):
            other = part_of(module)
            if other != own:
                assert floor_of(other) < floor_of(own), f"{path} imports {module}"


@every_file
def test_classification_needs_neither_mmdet_nor_mmseg(path):
    if part_of(name_of(path)) != "compat":
        roots = {module.split(".")[0] for module in imports_of(path)}
        assert not roots & {"mmdet", "mmseg"}


def test_every_part_stands_on_one_floor():
    parts = [part for floor in FLOORS for part in floor]
    assert sorted(parts) == sorted({part_of(name_of(path)) for path in FILES})


# -- two halves ------------------------------------------------------------------------


@pytest.mark.parametrize("path", FIRST_HALF_FILES, ids=name_of)
def test_the_first_half_imports_nothing_of_openmmlab_nor_of_the_second(path):
    for module in imports_of(path):
        root, _, rest = module.partition(".")
        assert root not in OPENMMLAB, f"{path} imports {module}"
        if root == "mmcastling" and rest:
            allowed = {*FIRST_HALF, "compat"}
            if path == PACKAGE / "__init__.py":
                allowed |= {"castle"}
            assert part_of(module) in allowed, f"{path} imports {module}"
            if part_of(module) == "compat":
                assert module == "mmcastling.compat.on_import" or (
                    module == "mmcastling.compat" and path == PACKAGE / "__init__.py"
                ), f"{path} imports {module}"


def in_fresh_process(code, *, cwd=None):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


WITH_TORCH_ALONE = """
import sys
toolboxes = ("mmengine", "mmcv", "mmdet", "mmpretrain", "mmseg")
neighbours = ("timm", "transformers", "cv2", "matplotlib", "pycocotools")
for name in (*toolboxes, *neighbours):
    sys.modules[name] = None
import torch
from torch import nn
import mmcastling
import mmcastling.analysis, mmcastling.checkpoint, mmcastling.deploy
import mmcastling.export, mmcastling.runtime

torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)


@mmcastling.register_adapter(Attention)
def adapt(attention, settings):
    from mmcastling.attention import Attention as CastlingAttention
    new = CastlingAttention(16, 4)
    new.qkv.load_state_dict(attention.qkv.state_dict())
    new.proj.load_state_dict(attention.proj.state_dict())
    return new


model = nn.Sequential(nn.Linear(3, 16), Attention(), nn.LayerNorm(16))
model = mmcastling.castle(model)
model = model[0] if isinstance(model, tuple) else model
assert len(list(mmcastling.castling_modules(model))) == 1
assert mmcastling.set_mask(model, "1/N") == 1
tokens = torch.randn(2, 9, 3)
on = model.train()(tokens)
on.sum().backward()
mmcastling.set_mask(model, 1.0)
off = model.eval()(tokens)
assert (on - off).abs().max() > 1e-4
deployed = mmcastling.switch_to_deploy(model)
torch.testing.assert_close(deployed(tokens), off, atol=1e-5, rtol=1e-5)
assert not list(mmcastling.castling_modules(deployed))
print("done")
"""


def test_castle_mask_and_deploy_need_torch_alone():
    assert in_fresh_process(WITH_TORCH_ALONE).endswith("done\n")


WITHOUT = """
import runpy, sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TOOLBOXES = "mmengine,mmcv,mmdet,mmpretrain,mmseg"
LIGHT = f"{TOOLBOXES},pycocotools,cv2,matplotlib"
SMALL = ("--size", "160", "160")
ALIGN = ("timm:test_vit", "-", "PICTURES", "OUT/aligned", *SMALL, "--steps", "1", "0")
SCAN = ("timm:test_vit", "-", "PICTURES", *SMALL, "--out", "OUT/x.png")


@pytest.mark.long
@pytest.mark.parametrize(
    ("missing", "command", "said"),
    [
        (LIGHT, ("doctor.py", "timm:test_vit", *SMALL), "verdict: "),
        (LIGHT, ("export.py", "timm:test_vit", "OUT/m.pt2", *SMALL), "wrote "),
        (
            TOOLBOXES,
            ("doctor.py", "timm:test_vit", *SMALL, "--out", "OUT/x.png"),
            "drew",
        ),
        (TOOLBOXES, ("align.py", *ALIGN), "wrote "),
        (TOOLBOXES, ("scan.py", *SCAN), "drew "),
        (LIGHT, ("align.py", *ALIGN), "error: figures are drawn with matplotlib"),
        ("cv2", ("align.py", *ALIGN), "error: pictures are read with OpenCV"),
        (LIGHT, ("scan.py", *SCAN), "error: figures are drawn with matplotlib"),
        (
            LIGHT,
            ("doctor.py", "timm:test_vit", *SMALL, "--out", "OUT/x.png"),
            "error: figures are drawn with matplotlib",
        ),
        (
            TOOLBOXES,
            ("doctor.py", "configs/castling_tiny_in1k.py", *SMALL),
            "error: configs need OpenMMLab",
        ),
        (
            TOOLBOXES,
            ("align.py", "configs/castling_tiny_in1k.py", *ALIGN[1:]),
            "error: configs need OpenMMLab",
        ),
        (
            TOOLBOXES,
            ("export.py", "configs/castling_tiny_in1k.py", "x.pth"),
            "error: configs need OpenMMLab",
        ),
    ],
)
def test_commands_on_named_models_need_no_toolbox(missing, command, said, tmp_path):
    pytest.importorskip("timm")
    for index in range(4):
        noise = torch.randint(0, 256, (3, 200, 200), dtype=torch.uint8)
        write_png(noise, str(tmp_path / f"{index}.png"))
    places = {"PICTURES": str(tmp_path), "OUT": str(tmp_path)}
    (tool, *words) = command
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing, f"tools/{tool}", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert said in (done.stderr if said.startswith("error") else done.stdout), done
    assert done.returncode == said.startswith("error")
    assert "Traceback" not in done.stderr, done.stderr


TIMED = """
import json, sys, time
import torch
start = time.process_time()
import mmcastling
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def test_the_import_is_quick_and_brings_no_toolbox():
    runs = [json.loads(in_fresh_process(TIMED)) for _ in range(2)]
    for _, roots in runs:
        assert not set(roots) & {*OPENMMLAB, *NEIGHBOURS}
    # of the processor, on top of torch; the less disturbed of the two
    assert min(seconds for seconds, _ in runs) < 0.5


@pytest.mark.slow
def test_classification_works_without_mmdet_mmseg_and_timm():
    in_fresh_process("""
import sys
for name in ("mmdet", "mmseg", "timm"):
    sys.modules[name] = None
import mmcastling
from mmpretrain.registry import MODELS
MODELS.build(dict(type="mmcastling.CastlingViT", arch="nano", img_size=32))
""")


# -- files and names -------------------------------------------------------------------


def test_shipped_files_are_short_enough_to_read():
    for path in [*FILES, *(ROOT / "tools").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_no_two_modules_have_one_name():
    counts = Counter(path.stem for path in FILES if path.stem != "__init__")
    assert [name for name, count in counts.items() if count > 1] == []


def public_names(path):
    """Functions and classes of a module, but what is registered somewhere for use."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            if not node.name.startswith("_") and "register" not in decorators:
                yield node.name


def words_used():
    """How often a name stands in code outside tests, its own definition left out."""
    counts = Counter()
    folders = ("mmcastling", "tools", "benchmarks", "configs")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if ".mim" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name):
                counts[node.id] += 1
            elif isinstance(node, ast.Attribute):
                counts[node.attr] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                # of a config, or of a table of names; not of an __all__ or a docstring
                counts[node.value.rpartition(".")[2]] += 1
            elif isinstance(node, ast.Assign) and "__all__" in map(
                ast.unparse, node.targets
            ):
                counts.subtract(ast.literal_eval(node.value))
    return counts


@pytest.fixture(scope="module")
def used():
    counts = words_used()
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text()
        counts.update(
            "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
        )
    return counts


@every_file
def test_what_is_public_is_used_outside_of_tests(path, used):
    unused = [
        name for name in public_names(path) if used[name] < 1 and name not in ORACLES
    ]
    assert unused == [], f"{path}: remove, or begin with an underscore"
