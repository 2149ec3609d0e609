"""Exported models against torch: onnxruntime and OpenVINO, float32 and lower.

python benchmarks/runtimes.py         # measure (15 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

The ViT-S backbone, and Mask R-CNN on it from a preprocessed image to boxes and pasted
masks, with as many detections as it may return (random weights, the first class made
likely). Files and precisions are those that tools/export.py writes; OpenVINO's int8
takes the steps of inputs from one picture of noise here.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from backbones import TOKEN_CONV, vit
from common import Benchmark, Contender, Size, Target, image, median
from detectors import detector
from torch import Tensor, nn

from mmcastling.analysis import count_model_macs
from mmcastling.deploy.export import FORMATS, export_graph, quantise, write
from mmcastling.deploy.runtime import (
    ExportedInferencer,
    ExportMetadata,
    load_exported,
)
from mmcastling.deploy.runtime.preprocess import Prepared
from mmcastling.engine.reference import reference_outputs

SIZE: Size = (800, 1344)
ROUNDS = 5
LIMIT = 0.8
_SHARED = "MMCASTLING_BENCHMARK_RUNTIMES"
BACKBONE, DETECTOR = "ViT-S", "Mask R-CNN ViT-S"
RUNTIMES = {
    "onnxruntime": ("onnx", "fp32"),
    "onnxruntime int8": ("onnx", "int8"),
    "OpenVINO": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO int8": ("openvino", "int8"),
}
if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
    del RUNTIMES["OpenVINO bf16"]


class Alone(nn.Module):
    """A backbone in the place of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit(TOKEN_CONV)().eval()

    def forward(self, images: Tensor) -> Any:
        return self.backbone(images)


BUILD: dict[str, Callable[[], nn.Module]] = {
    BACKBONE: lambda: Alone().eval(),
    DETECTOR: detector("mask_rcnn_castling_s_coco"),
}


def metadata(name: str, precision: str = "fp32") -> ExportMetadata:
    """What the exported files of a model say."""
    if name == BACKBONE:
        return ExportMetadata(
            kind="backbone",
            name=name,
            outputs=("feature_0",),
            min_size=16,
            precision=precision,
        )
    return ExportMetadata(
        kind="detector",
        name=name,
        outputs=("boxes", "scores", "labels", "masks"),
        size_divisor=32,
        min_size=32,
        dynamic_batch=False,
        precision=precision,
    )


@functools.cache
def _folder() -> Path:
    # The processes that measure memory inherit the variable, and find the files there.
    if _SHARED not in os.environ:
        os.environ[_SHARED] = tempfile.mkdtemp(prefix="runtimes-")
        atexit.register(shutil.rmtree, os.environ[_SHARED], ignore_errors=True)
    return Path(os.environ[_SHARED])


@functools.cache
def exported(name: str, runtime: str) -> Path:
    """A model's file for a runtime, written once."""
    kind, precision = RUNTIMES[runtime]
    path = _folder() / f"{name} {runtime}{FORMATS[kind]}"
    if path.exists():
        return path
    torch.manual_seed(0)
    part = "backbone" if name == BACKBONE else "model"
    write(export_graph(BUILD[name](), part), path, metadata(name, precision), kind)
    if precision == "int8":
        (picture,) = image((224, 224))
        quantise(path, [dict(images=picture.numpy())])
    return path


def eager(name: str) -> Callable[..., Callable[[], Any]]:
    """Passes of torch, as it comes."""

    def make_pass(model: nn.Module, images: Tensor) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            return reference_outputs(model, metadata(name), images, SIZE)

        return run

    return make_pass


def compiled(name: str) -> Callable[..., Callable[[], Any]]:
    """Passes of torch with the backbone compiled."""

    def make_pass(model: nn.Module, images: Tensor) -> Callable[[], Any]:
        model.backbone.compile()
        run = eager(name)(model, images)
        run()  # compiles
        return run

    return make_pass


def session(name: str, runtime: str) -> Callable[..., Callable[[], Any]]:
    """Passes of an exported file."""

    def make_pass(model: nn.Module, images: Tensor) -> Callable[[], Any]:
        del model  # the file holds it
        path = exported(name, runtime)
        inferencer = ExportedInferencer(
            load_exported(path, threads=torch.get_num_threads())
        )
        prepared = Prepared(images.numpy(), SIZE, SIZE, (1.0, 1.0))
        inferencer.predict_prepared(prepared)  # plans its memory
        return lambda: inferencer.predict_prepared(prepared)

    return make_pass


def contenders() -> dict[str, Contender]:
    """By name: model, comma, what runs it."""
    found = {}
    for name, build in BUILD.items():
        passes = {"torch": eager(name), "torch compiled": compiled(name)}
        for runtime in RUNTIMES:
            # NNCF would have to calibrate a detector on images with objects.
            if name == BACKBONE or runtime != "OpenVINO int8":
                passes[runtime] = session(name, runtime)
        for runtime, make_pass in passes.items():
            found[f"{name}, {runtime}"] = Contender(
                build, image, make_pass=make_pass, count=_macs
            )
    return found


def _macs(model: nn.Module) -> int:
    return count_model_macs(model, SIZE).macs


def rounding(device: str) -> dict[str, Any]:
    """Largest difference of the backbone's features from torch's, over the largest."""
    del device
    torch.manual_seed(0)
    model, (picture,) = BUILD[BACKBONE](), image((320, 448))
    with torch.inference_mode():
        (expected,) = model(picture)
    scale = float(expected.abs().max())
    found = {}
    for runtime in RUNTIMES:
        run = load_exported(exported(BACKBONE, runtime))
        apart = np.abs(run(picture)["feature_0"] - expected.numpy()).max()
        found[runtime] = float(apart) / scale
    return dict(rounding=found)


def targets(result: dict[str, Any]) -> list[Target]:
    """What was to be reached."""
    times = {
        runtime: median(result, f"{BACKBONE}, {runtime}", SIZE) for runtime in RUNTIMES
    }
    full = {name: times[name] for name, kind in RUNTIMES.items() if kind[1] == "fp32"}
    floor = median(result, f"{BACKBONE}, torch", SIZE)
    return [
        Target(
            f"exported ViT-S at 800x1344 in the best runtime{what}: time over eager's",
            min(values.values()) / floor,
            LIMIT,
        )
        for what, values in (("", times), (", float32", full))
    ]


def section(result: dict[str, Any], table: str) -> str:
    """The part of the report that this benchmark fills.

    Args:
        result: The stored result.
        table: Its cells as a table.
    """
    rows = "".join(
        f"| {name} | {value:.2g} |\n" for name, value in result["rounding"].items()
    )
    return f"""
## Exported models

`tools/export.py` wrote the files. Detectors run from a preprocessed image to boxes and
pasted masks; *compiled* is `torch.compile` of the backbone. A runtime plans its memory
before the pass whose peak is measured, so peaks compare within torch only.

{table}
Largest difference of the backbone's features from torch's, over the largest feature:

| runtime | difference |
| --- | --- |
{rows}"""


BENCHMARK = Benchmark(
    name="runtimes",
    contenders=contenders(),
    repeats={SIZE: ROUNDS},
    extra=rounding,
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
