"""The site's pages from the root of the repository, and Sphinx's roles as links."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FILES = ("CITATION.cff", "LICENSE")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, with links that hold inside ``docs/``."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        for other, target in PAGES.items():
            text = re.sub(rf"\]\({re.escape(other)}(?=[)#])", f"]({target}", text)
        text = re.sub(r"\]\(docs/", "](", text)
        files.append(File.generated(config, page, content=text))
    for name in FILES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links to them, which hold in the repository, as they hold on the site."""
    for source, page in PAGES.items():
        markdown = re.sub(rf"\]\(\.\./{re.escape(source)}", f"]({page}", markdown)
    return markdown


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Read docstrings as Sphinx would: ``:func:`name``` links, ``::`` opens code.

    A name that has no place on the site stays plain code.
    """
    if not page.file.src_uri.startswith("api/"):
        return html
    module = page.file.src_uri.removeprefix("api/").removesuffix(".md")
    room = "mmcastling" if module == "mmcastling" else f"mmcastling.{module}"

    def link(match: re.Match[str]) -> str:
        name = match["name"].removeprefix("~")
        path = name if name.startswith("mmcastling.") else f"{room}.{name}"
        shown = name.rpartition(".")[2] if match["name"] != name else name
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    role = r":(?:func|class|meth|mod|data|attr):<code>(?P<name>[^<]+)</code>"
    return re.sub(role, link, html).replace("::</p>", ":</p>")
