"""Exported models against torch: onnxruntime and OpenVINO, float32 and lower.

make demo                             # trains the detector of the last table
python benchmarks/runtimes.py         # measure (15 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

The ViT-S backbone, and Mask R-CNN on it from a preprocessed image to boxes and pasted
masks, with as many detections as it may return (random weights, the first class made
likely). Files are written as tools/export.py writes them; OpenVINO's int8 takes the
steps of inputs from one picture of noise here, in the table of accuracies from images.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbones import TOKEN_CONV, vit
from common import Benchmark, Contender, Size, Target, image, median
from detectors import detector
from precision import METRICS, demo_detector, scores
from torch import Tensor, nn

from mmcastling.analysis import count_model_macs
from mmcastling.export import (
    FORMATS,
    check_export_precision,
    export_graph,
    lower,
    reference_outputs,
    write_graph,
)
from mmcastling.run import evaluate, evaluate_exported
from mmcastling.run.exporting import export
from mmcastling.runtime import ExportedInferencer, ExportedModel, ExportMetadata
from mmcastling.runtime.preprocess import Prepared

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


@functools.cache
def lacking() -> dict[str, str]:
    """The runtimes that this machine cannot run, and why."""
    reasons = {}
    for runtime, (kind, precision) in RUNTIMES.items():
        try:
            check_export_precision(precision, kind)
        except RuntimeError as error:
            reasons[runtime] = str(error)
    return reasons


def available() -> list[str]:
    """The runtimes that it can."""
    return [runtime for runtime in RUNTIMES if runtime not in lacking()]


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


def metadata(name: str) -> ExportMetadata:
    """What the exported files of a model say."""
    if name == BACKBONE:
        return ExportMetadata(
            kind="backbone", name=name, outputs=("feature_0",), min_size=16
        )
    return ExportMetadata(
        kind="detector",
        name=name,
        outputs=("boxes", "scores", "labels", "masks"),
        size_divisor=32,
        min_size=32,
        dynamic_batch=False,
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
    if precision != "fp32":
        source = exported(name, "OpenVINO" if kind == "openvino" else "onnxruntime")
        (picture,) = image((224, 224))
        text = dataclasses.replace(metadata(name), precision=precision).to_json()
        lower(source, path, precision, text, [dict(images=picture.numpy())])
        return path
    torch.manual_seed(0)
    part = "backbone" if name == BACKBONE else "model"
    write_graph(export_graph(BUILD[name](), part), path, metadata(name), kind)
    return path


def eager(name: str) -> Callable[..., Callable[[], Any]]:
    """Passes of torch, as it comes."""

    def make_pass(model: nn.Module, images: Tensor) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            return reference_outputs(model, metadata(name).kind, images, SIZE)

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
        inferencer = ExportedInferencer(path, threads=torch.get_num_threads())
        prepared = Prepared(images.numpy(), SIZE, SIZE, (1.0, 1.0))
        inferencer.predict_prepared(prepared)  # plans its memory
        return lambda: inferencer.predict_prepared(prepared)

    return make_pass


def contenders() -> dict[str, Contender]:
    """By name: model, comma, what runs it."""
    found = {}
    for name, build in BUILD.items():
        passes = {"torch": eager(name), "torch compiled": compiled(name)}
        for runtime in available():
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
    for runtime in available():
        run = ExportedModel(exported(BACKBONE, runtime))
        apart = np.abs(run(picture)["feature_0"] - expected.numpy()).max()
        found[runtime] = float(apart) / scale
    return dict(rounding=found)


def accuracy() -> dict[str, Any]:
    """The demo's detector from torch, and from the file of each runtime."""
    cfg, checkpoint = demo_detector()
    rows = {"torch": scores(evaluate(cfg, checkpoint))}
    for runtime in available():
        kind, precision = RUNTIMES[runtime]
        path = _folder() / f"demo {runtime}{FORMATS[kind]}"
        cfg, _ = demo_detector()
        export(cfg, checkpoint, path, format=kind, precision=precision)
        cfg, _ = demo_detector()
        rows[runtime] = scores(evaluate_exported(cfg, path))
    return dict(detector=rows)


def measure_more(device: str) -> dict[str, Any]:
    absent = {f"{BACKBONE}, {name}": reason for name, reason in lacking().items()}
    # Evaluating and exporting need a process in which nothing was compiled.
    with ProcessPoolExecutor(
        1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)
    ) as pool:
        found = pool.submit(accuracy).result()
    return {**rounding(device), **found, "lacking": absent}


def targets(result: dict[str, Any]) -> list[Target]:
    """What was to be reached."""
    measured = [name for name in RUNTIMES if name in result["detector"]]
    times = {name: median(result, f"{BACKBONE}, {name}", SIZE) for name in measured}
    full, int8 = (
        {name: times[name] for name in measured if RUNTIMES[name][1] == precision}
        for precision in ("fp32", "int8")
    )
    floor = median(result, f"{BACKBONE}, torch", SIZE)
    apart = max(
        abs(result["detector"][runtime][name] - result["detector"]["torch"][name])
        for runtime in full
        for name in METRICS
    )
    same = Target("demo's detector exported in float32: change of AP", apart, 0.0005)
    return [
        *(
            Target(
                f"exported ViT-S at 800x1344, best runtime{what}: time over eager's",
                min(values.values()) / floor,
                LIMIT,
            )
            for what, values in (("", times), (", float32", full))
        ),
        Target(
            "ViT-S at 800x1344 in int8, best runtime: speed over eager float32's",
            floor / min(int8.values()),
            2.5,
            least=True,
        ),
        same,
    ]


INTRODUCTION = """
## Exported models

Files are as `tools/export.py` writes them. Detectors run from a preprocessed image to
boxes and pasted masks; *compiled* is `torch.compile` of the backbone. A runtime plans
its memory before the pass whose peak is measured, so peaks compare within torch only.

"""


def section(result: dict[str, Any], table: str) -> str:
    """The part of the report that this benchmark fills.

    Args:
        result: The stored result.
        table: Its cells as a table.
    """
    apart = "".join(
        f"| {name} | {value:.2g} |\n" for name, value in result["rounding"].items()
    )
    demo = "".join(
        f"| {name} | {row['bbox']:.3f} | {row['segm']:.3f} | {row['seconds']:.3f} |\n"
        for name, row in result["detector"].items()
    )
    return f"""\
{table}
Largest difference of the backbone's features from torch's, over the largest feature:

| runtime | difference |
| --- | --- |
{apart}
The demo's detector on its 24 validation tiles, as by `tools/export.py --precision` and
`tools/test.py`:

| runtime | bbox AP | segm AP | s / image |
| --- | --- | --- | --- |
{demo}"""


BENCHMARK = Benchmark(
    name="runtimes",
    contenders=contenders(),
    repeats={SIZE: ROUNDS},
    extra=measure_more,
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
