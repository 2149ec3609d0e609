"""Installing the stand-in for ``mmcv._ext``: when, what it answers, what it refuses."""

import ast
import importlib
import importlib.util
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mmcastling.compat import mmcv_ext
from mmcastling.compat.mmcv_ext import MissingOpError, require_ops
from mmcastling.compat.mmcv_ops import KERNELS

EXT = "mmcv._ext"


def forget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module be imported anew; what is there now comes back after the test."""
    # setitem first: it makes monkeypatch restore, or remove, the entry afterwards.
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    del sys.modules[name]


@pytest.fixture
def no_ext(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process into which no ``mmcv._ext`` was loaded."""
    forget(EXT, monkeypatch)


@pytest.fixture
def stand_in(no_ext: None) -> ModuleType:
    module = importlib.import_module(EXT)
    if module.__spec__.origin != mmcv_ext.__name__:
        pytest.skip("a compiled mmcv is installed, so no stand-in is made")
    return module


@pytest.fixture
def fake_mmcv(no_ext: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty package called mmcv, first on the path."""
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    forget("mmcv", monkeypatch)
    return package


def test_asking_again_keeps_the_first_stand_in(stand_in: ModuleType) -> None:
    require_ops()
    assert sys.modules[EXT] is stand_in


def test_present_ext_module_is_left_untouched(
    no_ext: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ModuleType(EXT)
    before = dict(vars(theirs))
    monkeypatch.setitem(sys.modules, EXT, theirs)
    require_ops()
    assert sys.modules[EXT] is theirs
    assert vars(theirs) == before


def test_compiled_file_on_disk_prevents_the_stand_in(fake_mmcv: Path) -> None:
    (fake_mmcv / "_ext.py").write_text("compiled = True")
    require_ops()
    assert sys.modules[EXT].compiled


def test_mmcv_without_ops_gets_the_stand_in(fake_mmcv: Path) -> None:
    require_ops()
    assert sys.modules[EXT].nms is KERNELS["nms"]


def test_absent_mmcv_is_an_import_error_that_says_what_to_install(
    no_ext: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ImportError, match="pip install onedl-mmcv") as caught:
        require_ops()
    assert caught.value.name == "mmcv"


def test_absent_torchvision_is_an_import_error_that_names_the_torch_release(
    fake_mmcv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=re.escape(torch.__version__)) as caught:
        importlib.import_module(EXT)
    assert caught.value.name == "torchvision"
    assert EXT not in sys.modules


@pytest.mark.parametrize("holder", ["mmdet.structures.mask", "mmseg.models"])
def test_a_toolbox_that_was_imported_without_ops_is_a_warning(
    holder: str, fake_mmcv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, holder, ModuleType(holder))
    monkeypatch.delitem(sys.modules, "mmcv.ops", raising=False)
    with pytest.warns(UserWarning, match=re.escape(holder)):
        require_ops()


def test_unknown_op_is_there_and_raises_when_called(stand_in: ModuleType) -> None:
    op = stand_in.carafe_forward
    with pytest.raises(MissingOpError, match=r"'carafe_forward'.*MMCV_WITH_OPS=1"):
        op(torch.ones(1), group=1)


@pytest.mark.parametrize("name", ["__wrapped__", "__path__", "_pytestfixturefunction"])
def test_probes_for_private_names_get_no_answer(
    name: str, stand_in: ModuleType
) -> None:
    assert not hasattr(stand_in, name)


def test_missing_op_error_survives_pickling() -> None:
    # Errors of data loader workers and launched processes travel this way.
    error = pickle.loads(pickle.dumps(MissingOpError("knn_forward")))
    assert error.op == "knn_forward"
    assert str(error) == str(MissingOpError("knn_forward"))


def test_find_spec_sees_the_stand_in(stand_in: ModuleType) -> None:
    # mmengine's mmcv_full_available asks this way, and a module without a spec is a
    # ValueError there.
    spec = importlib.util.find_spec(EXT)
    assert spec is not None
    assert spec.loader is not None


def _pybind_parameters(name: str, binding: str) -> list[str]:
    definition = re.search(rf'm\.def\("{name}",.*?;', binding, re.S)
    assert definition, f"mmcv binds no op {name}"
    return re.findall(r'py::arg\("(\w+)"\)', definition[0])


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_parameters_are_those_of_the_compiled_op(name: str) -> None:
    mmcv = importlib.util.find_spec("mmcv")
    source = Path(mmcv.origin).parent / "ops/csrc/pytorch/pybind.cpp"
    if not source.exists():
        pytest.skip("this mmcv comes without the sources of its ops")
    expected = _pybind_parameters(name, source.read_text())
    assert list(inspect.signature(KERNELS[name]).parameters) == expected


def test_the_ops_import_nothing_of_openmmlab() -> None:
    own = Path(mmcv_ext.__file__)
    sources = [own, *(own.parent / "mmcv_ops").glob("*.py")]
    assert len(sources) > 6
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert not name.startswith("mm") or name.startswith("mmcastling."), (
                    f"{source.name} imports {name}"
                )


FRESH_PROCESS = """
import mmcastling
from mmcastling.compat.mmcv_ext import MissingOpError
import mmcv.cnn, mmcv.ops
from mmcv.utils import collect_env
from mmengine.utils.dl_utils import mmcv_full_available
assert mmcv_full_available()
assert mmcv.ops.batched_nms and mmcv.ops.RoIAlign
print(mmcv.ops.get_compiler_version(), mmcv.ops.get_compiling_cuda_version())
if mmcv._ext.__spec__.origin == "mmcastling.compat.mmcv_ext":
    import torch
    try:
        mmcv.ops.box_iou_rotated(torch.ones(1, 5), torch.ones(1, 5))
    except MissingOpError as error:
        assert error.op == "box_iou_rotated", error.op
    else:
        raise AssertionError("box_iou_rotated ran")
print("done")
"""


def test_mmcv_ops_imports_in_a_fresh_process() -> None:
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("done\n")
