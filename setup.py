"""Packaging: the wheel holds the package, and configs and tools in ``mmcastling/.mim``.

``.mim`` is where the OpenMMLab tools look for them: ``mmcastling::NAME.py`` in a
``_base_``, or ``mim`` on the command line.
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = ("configs", "tools")


class BuildWithMim(build_py):
    """Put configs and tools under ``mmcastling/.mim``: copies, or links if editable."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            mim = ROOT / "mmcastling" / ".mim"
            mim.mkdir(exist_ok=True)
            for name in SHIPPED:
                link = mim / name
                if not link.is_symlink():
                    link.symlink_to(os.path.relpath(ROOT / name, mim))
            return
        mim = Path(self.build_lib) / "mmcastling" / ".mim"
        for name in SHIPPED:
            shutil.rmtree(mim / name, ignore_errors=True)
            shutil.copytree(
                ROOT / name, mim / name, ignore=shutil.ignore_patterns("__pycache__")
            )


def requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
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
    install_requires=requirements(),
    cmdclass={"build_py": BuildWithMim},
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
