"""Each library knows what is ours, whichever is imported first, and when it asks."""

import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from torch import nn

import mmcastling
from mmcastling.attention import TokenConv
from mmcastling.compat import registrations
from mmcastling.compat.on_import import AFTER_IMPORT, MOVED

TIMM = """
import timm
assert len(timm.list_models("castling_*")) == 13
assert "mmcastling.models" not in sys.modules
model = timm.create_model("castling_vit_nano", img_size=32, num_classes=2)
assert type(model).__name__ == "CastlingClassifier"
"""
ROOT = """
from mmengine.registry import HOOKS
assert HOOKS.get("MaskDecayHook").__module__ == "mmcastling.train.mask_decay_hook"
"""
TOOLBOX = """
import mmpretrain
from mmpretrain.registry import HOOKS, MODELS
vit = MODELS.build(dict(type="mmpretrain.CastlingViT", arch="nano", img_size=32))
assert type(vit).__module__ == "mmcastling.models.castling_vit"
assert HOOKS.get("MaskDecayHook").__module__ == "mmcastling.train.mask_decay_hook"
assert "castling_tiny_in1k" in mmpretrain.list_models("castling_")
import mmdet.apis
from mmdet.registry import MODELS
assert MODELS.get("mmcastling.CastlingViT").__module__.startswith("mmcastling.models")
from mmdet.structures.mask import BitmapMasks
import mmcv.ops
"""
BLIP = """
MODELS.build(dict(type="mmcastling.CastlingViT", arch="nano", img_size=32))
try:
    MODELS.build(dict(type="mmpretrain.BlipCaption"))
except ImportError as error:
    print(error)
"""
OURS_FIRST = f"""
import mmcastling
assert not {{"mmengine", "mmcv", "timm"}} & set(sys.modules)
assert mmcastling.analysis.count_macs
import mmdet.datasets, mmpretrain.datasets, mmseg.datasets  # print nothing
{ROOT}
"""
# Their registry has been asked before, so that its places will not be read again.
THEIRS_FIRST = f"""
import mmengine.hooks, timm
import mmpretrain.utils.dependency as dependency
dependency.WITH_MULTIMODAL = False  # beside transformers 5 we must be first
from mmpretrain.registry import HOOKS, MODELS
assert MODELS.get("LeViT") and HOOKS.get("EMAHook")
import mmcastling
{TIMM}
{TOOLBOX}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [OURS_FIRST + TOOLBOX, THEIRS_FIRST, "import mmcastling\n" + TIMM + ROOT],
    ids=["ours-first", "theirs-first", "timm-asks-first"],
)
@pytest.mark.long
def test_libraries_know_ours_in_every_order(code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if code.startswith(OURS_FIRST):
        assert done.stdout == ""  # where a package is missing, it is at debug level


@pytest.mark.slow
@pytest.mark.parametrize(
    "theirs_first", [False, pytest.param(True, marks=pytest.mark.long)]
)
def test_mmpretrain_is_imported_beside_transformers_5(theirs_first):
    pytest.importorskip("transformers", reason="pip install -r requirements-dev.txt")
    lines = ["import mmcastling", "from transformers import ViTModel"]
    lines = lines[::-1] if theirs_first else lines
    code = "\n".join([*lines, "from mmpretrain.registry import MODELS", BLIP])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mmpretrain[multimodal]" in done.stdout
    if not theirs_first:
        assert done.stderr == ""


@pytest.mark.parametrize("name", AFTER_IMPORT)
def test_every_module_to_wait_for_exists(name):
    if name.partition(".")[0] in ("thop", "ptflops", "transformers"):
        pytest.importorskip(name, reason="a user may have it")
    assert importlib.import_module(name).__name__ == name


@pytest.mark.parametrize(
    ("name", "table"),
    [("thop.profile", "register_hooks"), ("ptflops.pytorch_ops", "MODULES_MAPPING")],
)
def test_counters_that_ask_for_exact_classes_know_ours(name, table):
    rules = {nn.Linear: "linear", nn.Conv2d: "convolution"}
    tell = getattr(registrations, AFTER_IMPORT[name])
    tell(SimpleNamespace(**{table: rules}))
    assert rules[TokenConv] == "convolution"


@pytest.mark.parametrize("name", MOVED)
def test_a_former_name_says_where_it_went(name):
    now = MOVED[name]
    assert importlib.import_module(now.partition(" ")[0])
    text = f"{name} has moved: since mmcastling 0.2.0 it is {now}"
    with pytest.raises(ModuleNotFoundError, match=re.escape(text)):
        importlib.import_module(f"{name}.anything")
    with pytest.raises(ModuleNotFoundError, match="has moved") as caught:
        importlib.import_module(name)
    assert caught.value.name == name


def test_what_never_was_is_an_ordinary_error():
    with pytest.raises(
        ModuleNotFoundError, match=r"No module named 'mmcastling\.engin'"
    ):
        importlib.import_module("mmcastling.engin")
    with pytest.raises(AttributeError, match="no attribute 'engin'"):
        _ = mmcastling.engin
    with pytest.raises(AttributeError, match=r"mmcastling\.engine has moved"):
        _ = mmcastling.engine


@pytest.mark.slow
def test_what_another_library_has_wrapped_is_wrapped_all_the_same():
    code = """
import functools
from mmengine.registry import MODELS, Registry
theirs = Registry.get
@functools.wraps(theirs)
def get(self, key):
    return theirs(self, key)
Registry.get = get
import mmcastling
assert MODELS.get("mmcastling.CastlingViT") is not None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
