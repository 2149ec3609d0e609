"""Packaging: the wheel holds the package, and configs and tools in ``mmcastling/.mim``.

``.mim`` is where the OpenMMLab tools look for them. MMEngine wants a folder between the
package and a config's name, and ours are flat, so that they are there twice: in
``.mim/configs``, where ``model-index.yml`` says, and in ``.mim/configs/castling``, for
``mmcastling::castling/NAME.py`` in a ``_base_``.
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = {"configs": "configs", "configs/castling": "configs", "tools": "tools"}
INDEX = "model-index.yml"


class BuildWithMim(build_py):
    """Put configs and tools under ``mmcastling/.mim``: copies, or links if editable."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            link_mim(ROOT / "mmcastling" / ".mim")
            return
        mim = Path(self.build_lib) / "mmcastling" / ".mim"
        shutil.rmtree(mim, ignore_errors=True)
        for name, source in SHIPPED.items():
            shutil.copytree(
                ROOT / source,
                mim / name,
                ignore=shutil.ignore_patterns("__pycache__"),
                dirs_exist_ok=True,
            )
        shutil.copy(ROOT / INDEX, mim / INDEX)


def link_mim(mim):
    """Fill ``.mim`` with links: folders as such, so that a new config is seen at once.

    What ``model-index.yml`` names is linked one by one, beside the link to the folder.
    """
    for old in (mim / "configs", mim / "tools"):
        if old.is_symlink():
            old.unlink()
    (mim / "configs").mkdir(parents=True, exist_ok=True)
    sources = {mim / "tools": ROOT / "tools", mim / INDEX: ROOT / INDEX}
    sources[mim / "configs" / "castling"] = ROOT / "configs"
    for path in (ROOT / "configs").iterdir():
        if path.name != "__pycache__":
            sources[mim / "configs" / path.name] = path
    for stale in (mim / "configs").iterdir():
        if stale.is_symlink() and not stale.exists():
            stale.unlink()
    for link, source in sources.items():
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(source, link.parent))


def requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return [line for line in lines if line]


def version():
    text = (ROOT / "mmcastling" / "version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]


setup(
    name="mmcastling",
    version=version(),
    description="Castling-ViT for OpenMMLab: castle a vision transformer, train it "
    "while its softmax masks decay to zero, deploy it linear",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["mmcastling", "mmcastling.*"]),
    install_requires=requirements("requirements.txt"),
    extras_require={
        "demo": requirements("requirements-demo.txt"),
        "coco": ["faster-coco-eval>=1.8,<1.9"],
        "export": [
            "onnx>=1.23,<2",
            "onnxscript>=0.7,<0.8",
            "onnxruntime>=1.32,<2",
            "openvino>=2026.4,<2027",
        ],
        "timm": ["timm>=1.0.3,<1.1"],
    },
    cmdclass={"build_py": BuildWithMim},
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
