"""The site builds without a warning, and its API pages hold the public names."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mmcastling

pytest.importorskip("mkdocs")

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "mkdocs.yml"
ROOMS = sorted(path.stem for path in (ROOT / "docs" / "api").glob("*.md"))


def build(config, site):
    """Run MkDocs; its exit status is 0 only without warnings."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-f", config, "--site-dir", site],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(CONFIG, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.parametrize(
    "text",
    ["[a page](nowhere.md)", "[a place](index.md#nowhere)", "![a picture](no.png)"],
)
def test_dead_links_end_the_build(text, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{text}\n")
    own = dict(nav=["index.md"], docs_dir="docs", plugins=[], hooks=[])
    config = tmp_path / "mkdocs.yml"
    config.write_text(yaml.safe_dump(dict(INHERIT=str(CONFIG), **own)))
    done = build(config, tmp_path / "site")
    assert done.returncode != 0
    assert "WARNING" in done.stderr
    (tmp_path / "docs" / "index.md").write_text("# Start\n")
    assert build(config, tmp_path / "site").returncode == 0


def test_the_readme_is_the_first_page(site):
    first = (site / "index.html").read_text()
    assert "See it work" in first
    for target in ("train/", "contributing/", "assets/predictions.png", "CITATION.cff"):
        assert f'"{target}"' in first
        assert (site / target).exists()


@pytest.fixture(scope="module")
def documented(site):
    pages = (site / "api").glob("*/index.html")
    text = "".join(page.read_text() for page in pages)
    return set(re.findall(r'id="(mmcastling[\w.]*)"', text))


def functions_and_classes(module):
    kinds = (inspect.isclass, inspect.isfunction)
    things = [(name, getattr(module, name)) for name in module.__all__]
    return [name for name, thing in things if any(kind(thing) for kind in kinds)]


def test_what_the_package_gives_is_on_an_api_page(documented):
    # A path of two parts may be a folder's, as that of ``castle``.
    names = {path.rpartition(".")[2] for path in documented if path.count(".") > 1}
    assert set(functions_and_classes(mmcastling)) <= names


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "mmcastling"])
def test_public_names_of_a_room_are_on_its_page(documented, room):
    module = importlib.import_module(f"mmcastling.{room}")
    for name in functions_and_classes(module):
        assert f"mmcastling.{room}.{name}" in documented


def test_docstrings_hold_no_markup_that_the_site_does_not_read(site):
    for page in (site / "api").rglob("index.html"):
        text = page.read_text()
        assert not re.search(r":(?:func|class|meth|mod|data|attr):", text), page
        assert "::</p>" not in text, page
        assert "<autoref" not in text, page
