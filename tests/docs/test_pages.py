"""What README and docs name is there, and their code runs."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import mmcastling
from mmcastling.registry import MODELS
from mmcastling.train import MaskDecayHook
from mmcastling.verbs import castling_modules

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]
}
IN_ROOT = {"index.md": "README.md"}  # as docs/hooks.py makes them
IN_ROOT |= {
    f"{name.lower()}.md": f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG")
}


def text_of(page):
    """The page without its code blocks."""
    return re.sub(r"```.*?```", "", PAGES[page].read_text(), flags=re.S)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(\s*(?!https?:)([^)#\s]+)", text_of(page)):
        there = PAGES[page].parent / target
        if PAGES[page].parent == DOCS and target in IN_ROOT:
            there = ROOT / IN_ROOT[target]
        assert there.exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_and_configs_exist(page):
    text = PAGES[page].read_text()
    for name in re.findall(r"(?:python|bash) ((?:tools|benchmarks)/\S+\.\w+)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"tools/[\w/]+\.(?:py|sh)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(
        r"`(?:configs/)?(\w+_(?:coco|in1k|nuclei|ade20k|camvid)\.py)`", text
    ):
        assert (ROOT / "configs" / name).exists(), name


def test_castling_pages_code_runs(tmp_path, monkeypatch):
    text = (DOCS / "castle.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    timm_model, of_transformers, config, ours, attention = snippets
    scope = {}
    exec(timm_model, scope)
    assert len(scope["report"].castled) == 12
    exec(ours.replace("800, 1344", "64, 96").replace('"small"', '"nano"'), scope)
    assert scope["features"].shape == (1, 128, 4, 6)
    exec(attention, scope)
    assert scope["tokens"].shape == (2, 196, 384)
    exec(config, scope)
    backbone = MODELS.build(scope["model"]["backbone"])
    assert len(list(castling_modules(backbone))) == 4  # of two stages
    pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    monkeypatch.chdir(tmp_path)
    exec(of_transformers, scope)
    assert scope["tokens"].shape == (1, 1 + 9 * 16, 96)


def test_hook_options_and_defaults_are_the_code_s():
    rows = dict(
        re.findall(
            r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`[^`]+`(?:, )?)+) \|",
            (DOCS / "train.md").read_text(),
            re.M,
        )
    )
    documented = {}
    for names, defaults in rows.items():
        values = [ast.literal_eval(v) for v in re.findall(r"`([^`]+)`", defaults)]
        documented |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    signature = inspect.signature(MaskDecayHook).parameters
    assert documented == {name: p.default for name, p in signature.items()}


def test_the_layout_names_every_room_of_the_package():
    tree = (DOCS / "layout.md").read_text().split("```")[1]
    named = set(re.findall(r"^  (\w+)(?:/|\.py) ", tree, re.M))
    package = Path(mmcastling.__file__).parent
    there = {p.stem for p in package.glob("*.py")} - {"__init__", "version"}
    there |= {p.parent.name for p in package.glob("*/__init__.py")}
    assert there <= named
    assert named - there <= {"errors"}
