"""The README says what is true."""

import ast
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

from mmcastling.train import MaskDecayHook
from mmcastling.verbs import castling_modules

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_demo_table_is_generated_from_the_stored_run():
    path = ROOT / "benchmarks" / "demo_table.py"
    spec = importlib.util.spec_from_file_location("demo_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    summary = json.loads(module.STORED.read_text())
    assert module.readme_with(summary, README) == README


def test_stored_demo_meets_its_targets():
    summary = json.loads((ROOT / "docs" / "assets" / "demo.json").read_text())
    trained, deployed = summary["train_graph"], summary["deploy"]
    for key in ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50"):
        assert trained[key] == deployed[key]
    assert deployed["bbox_mAP_50"] >= 0.40
    assert deployed["segm_mAP_50"] >= 0.40
    assert summary["max_abs_diff"] <= 1e-5
    assert deployed["macs"] < trained["macs"]
    assert summary["mask_density"][0] > 0 == summary["mask_density"][-1]


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_named_files_and_configs_exist():
    for name in re.findall(r"(?:python|bash) (\S+\.(?:py|sh))", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(\w+_(?:coco|in1k|nuclei|ade20k|camvid)\.py)`", README):
        assert (ROOT / "configs" / name).exists(), name


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    verbs, castling = (
        next(block for block in blocks if f"import {name}" in block)
        for name in ("torch", "timm")
    )
    scope = {}
    exec(verbs.replace("800, 1344", "64, 96").replace('"small"', '"nano"'), scope)
    assert scope["features"].shape == (1, 128, 4, 6)
    exec(castling, scope)
    assert len(list(castling_modules(scope["model"]))) == 12


def test_hook_options_and_defaults_are_the_code_s():
    rows = dict(
        re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`[^`]+`(?:, )?)+) \|", README, re.M)
    )
    documented = {}
    for names, defaults in rows.items():
        values = [ast.literal_eval(v) for v in re.findall(r"`([^`]+)`", defaults)]
        documented |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    signature = inspect.signature(MaskDecayHook).parameters
    assert documented == {name: p.default for name, p in signature.items()}
