"""The README says what is true."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from mmcastling.verbs import castling_modules

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def load_script(monkeypatch):
    """Load ``benchmarks/<name>.py`` as a script would find its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name):
        path = ROOT / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"readme_{name}", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_demo_table_is_generated_from_the_stored_run(load_script):
    module = load_script("demo_table")
    summary = json.loads(module.STORED.read_text())
    assert module.readme_with(summary, README) == README


def test_speed_table_is_generated_from_the_stored_result(load_script):
    module = load_script("report")
    paths = module.backbones.BENCHMARK.stored
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    assert module.readme_with(results, README) == README
    for result in results.values():
        for cell in result["cells"]:
            cell["seconds"]["median"] *= 2
    assert module.readme_with(results, README) != README


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


def test_code_blocks_run():
    castling, attention = re.findall(r"```python\n(.*?)```", README, re.S)
    scope = {}
    before, deploy = castling.split("mmcastling.set_mask")
    exec(before, scope)
    assert len(list(castling_modules(scope["model"]))) == 12
    exec(f"mmcastling.set_mask{deploy}", scope)
    assert not list(castling_modules(scope["model"]))
    exec(attention.replace("50 * 84", "5 * 8"), scope)
    assert scope["tokens"].shape == (2, 40, 384)
