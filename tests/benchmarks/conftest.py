"""The scripts in ``benchmarks/`` as modules, and pictures for those that learn."""

import gzip
import importlib.util
import struct
import sys
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="session")
def load_benchmark(root):
    """Load ``benchmarks/<name>.py`` by its name, once."""
    loaded = {}
    folder = str(root / "benchmarks")
    sys.path.insert(0, folder)  # as for a script that is run

    def load(name: str) -> ModuleType:
        if name not in loaded:
            path = root / "benchmarks" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
            loaded[name] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded[name]  # dataclasses look their module up
            spec.loader.exec_module(loaded[name])
        return loaded[name]

    yield load
    sys.path.remove(folder)
    for module in loaded.values():
        del sys.modules[module.__name__]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Dark and light pictures in Fashion-MNIST's files, half of them compressed."""
    folder = tmp_path_factory.mktemp("fashion")
    noise = np.random.default_rng(0)
    for split, count in (("train", 512), ("t10k", 128)):
        labels = noise.integers(0, 2, count, dtype=np.uint8)
        images = noise.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        images += 150 * labels[:, None, None]
        header = struct.pack(">4I", 0x803, count, 28, 28)
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images.tobytes())
        labels = struct.pack(">2I", 0x801, count) + labels.tobytes()
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return folder
