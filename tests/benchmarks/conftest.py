"""The scripts in ``benchmarks/`` as modules."""

import importlib.util
import sys
from types import ModuleType

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
