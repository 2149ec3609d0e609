"""Sessions of all runtimes: shared by threads, pickled, and without side effects."""

import os
import pickle
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from mmcastling.attention import Attention
from mmcastling.export import compare, write
from mmcastling.runtime import (
    ExportedInferencer,
    ExportedModel,
    ExportedModelError,
    ExportMetadata,
)

DYNAMIC = torch.export.Dim.DYNAMIC


# -- every option of every attention ---------------------------------------------------

ATTENTIONS = [
    dict(type="castling", local_conv="grid", reference_tokens=16, qkv_bias=False),
    dict(type="castling", local_conv=dict(type="token", kernel_size=3)),
    dict(type="castling", reference_tokens=9, norm_output=False, local_conv=None),
    dict(type="linear_angular", layer_scale_init_value=0.5, proj_bias=False),
    dict(type="efficient", norm_output=True),
    dict(type="focused", focus=2),
    dict(type="hydra", local_conv="token"),
    dict(type="performer", num_features=12, seed=3),
    dict(type="relu_linear", local_conv="grid"),
    dict(type="softmax"),
]


class Together(nn.Module):
    """Attentions on the same tokens, so that one graph shows all of them."""

    def __init__(self, specs):
        super().__init__()
        built = [Attention(16, 2, deploy=True, **options) for options in specs]
        self.attentions = nn.ModuleList(built)

    def forward(self, images):  # (B, 16, H, W)
        tokens = images.flatten(2).transpose(1, 2)
        return tuple(each(tokens, images.shape[2:]) for each in self.attentions)


def names_of(model):
    return [f"feature_{index}" for index, _ in enumerate(model.attentions)]


# Every option is in the ONNX file, which OpenVINO reads; torch's takes long to load.
FILES = {"model.onnx": ATTENTIONS, "model.pt2": ATTENTIONS[:1]}
RUNS = dict(onnxruntime="model.onnx", openvino="model.onnx", torch="model.pt2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of the files, and the module of each."""
    folder, modules = tmp_path_factory.mktemp("attentions"), {}
    for name, specs in FILES.items():
        torch.manual_seed(0)
        model = Together(specs).eval().requires_grad_(False)
        meta = ExportMetadata("backbone", "X", tuple(names_of(model)), channels=16)
        write(
            *(model, folder / name, (torch.randn(2, 16, 5, 7),)),
            format="onnx" if name.endswith("onnx") else "exported-program",
            outputs=names_of(model),
            metadata=meta.to_json(),
            dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},),
        )
        modules[name] = model
    return folder, modules


@pytest.fixture(scope="module", params=RUNS)
def exported(request, files):
    folder, _ = files
    threads = None if request.param == "torch" else 1
    return ExportedModel(folder / RUNS[request.param], request.param, threads)


@pytest.fixture(scope="module")
def model(exported, files):
    return files[1][exported.path.name]


def expected_of(model, images):
    outputs = [output.numpy() for output in model(torch.from_numpy(images))]
    return dict(zip(names_of(model), outputs, strict=True))


def pictures(count, *shape):
    noise = np.random.default_rng(0)
    return [noise.standard_normal(shape, np.float32) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.long
def test_every_option_of_every_attention_is_exported(exported, model):
    for shape in ((1, 16, 6, 9), (3, 16, 4, 4), (2, 16, 2, 3)):
        (images,) = pictures(1, *shape)
        got = exported(images)
        for index, (name, value) in enumerate(expected_of(model, images).items()):
            apart = compare({name: value}, got)
            assert apart.holds, (ATTENTIONS[index], shape, str(apart))


@pytest.mark.slow
def test_threads_that_share_a_session_get_their_own_picture(exported, model):
    images = pictures(12, 1, 16, 12, 16)
    expected = [expected_of(model, x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for own, got in zip(expected, pool.map(exported, images), strict=True):
                assert compare(own, got).holds


@pytest.mark.slow
def test_what_runs_a_file_is_pickled_by_its_path(exported, files, monkeypatch):
    monkeypatch.chdir(files[0])
    threads = None if exported.runtime == "torch" else 1
    inferencer = ExportedInferencer(exported.path.name, exported.runtime, threads)
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(inferencer))
    assert again.metadata == inferencer.metadata
    assert again.model.runtime == exported.runtime
    (images,) = pictures(1, 1, 16, 4, 4)
    assert compare(exported(images), again.model(images)).holds


# -- what a file of torch may do -------------------------------------------------------


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("shift", torch.zeros(3, 1, 1), persistent=False)
        self.constant = torch.full((3, 1, 1), 2.0)

    def forward(self, images):
        return (images * self.weight * self.constant + self.shift,)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    meta = ExportMetadata("backbone", "Doubled", ("feature_0",))
    write(
        *(Doubled().eval(), path, (torch.randn(1, 3, 4, 4),)),
        format="exported-program",
        outputs=["feature_0"],
        metadata=meta.to_json(),
    )
    return path


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pickled(data):
    """Whether an entry of a program is a pickle that torch would load."""
    return data.startswith((b"PK", b"\x80"))


def test_no_part_of_a_program_runs_code_when_it_is_opened(
    program, attack, tmp_path, monkeypatch
):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    found = entries(program)
    parts = [name for name, data in found.items() if pickled(data)]
    assert parts
    torch.save(attack.payload, tmp_path / "payload")
    for part in parts:
        path = tmp_path / "crafted.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in found.items():
                payload = (tmp_path / "payload").read_bytes()
                archive.writestr(name, payload if name == part else data)
        with pytest.raises(ExportedModelError, match=r"cannot load .* bytes"):
            ExportedModel(path)
        assert not attack.trace.exists(), part
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    images = np.ones((1, 3, 4, 4), np.float32)
    assert (ExportedModel(program)(images)["feature_0"] == 2).all()


def test_threads_of_a_process_are_not_changed_for_a_file(program):
    before = torch.get_num_threads()
    with pytest.raises(ExportedModelError, match=r"call torch\.set_num_threads yours"):
        ExportedModel(program, threads=before + 1)
    ExportedModel(program, threads=before)
    assert torch.get_num_threads() == before


def test_a_program_without_detectors_needs_no_torchvision(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert ExportedModel(program).metadata.name == "Doubled"
