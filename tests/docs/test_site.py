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


@pytest.mark.parametrize("room", ROOMS)
def test_public_names_are_on_an_api_page(site, room):
    pages = [page.read_text() for page in (site / "api").glob("*/index.html")]
    there = set(re.findall(r'id="(mmcastling[\w.]*)"', "".join(pages)))
    package = "mmcastling" if room == "mmcastling" else f"mmcastling.{room}"
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            path = f"{package}.{name}"
            if path == "mmcastling.castle":  # also the name of a folder
                path = "mmcastling.castle.castle"
            assert {path, f"{thing.__module__}.{name}"} & there, name


def test_docstrings_hold_no_markup_that_the_site_does_not_read(site):
    for page in (site / "api").rglob("index.html"):
        text = page.read_text()
        assert not re.search(r":(?:func|class|meth|mod|data|attr):", text), page
        assert "::</p>" not in text, page
        assert "<autoref" not in text, page


def test_every_room_of_the_first_half_has_a_page():
    assert {"attention", "castle", "deploy", "export", "runtime", "analysis"} <= set(
        ROOMS
    )
    assert mmcastling.__name__ in ROOMS
