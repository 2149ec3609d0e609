"""Export a model and prove that the file says the same, for ``tools/export.py``."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata as package_metadata
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from torch import nn

from mmcastling.analysis import paired_medians
from mmcastling.checkpoint import CheckpointError, load_checkpoint
from mmcastling.data import DatasetError
from mmcastling.data.coco_problems import CocoFormatError
from mmcastling.data.segmentation_check import SegmentationFormatError
from mmcastling.deploy import set_precision
from mmcastling.errors import ConfigError
from mmcastling.export import (
    DEFAULT_OPSET,
    FORMATS,
    check_export_precision,
    check_format,
    export_graph,
    lower,
    write,
)
from mmcastling.export.agreement import Agreement, compare
from mmcastling.run.config import check_data, has_data
from mmcastling.run.conversion import build_pruned
from mmcastling.run.export_metadata import describe
from mmcastling.run.reference import reference_outputs
from mmcastling.runtime import ExportedInferencer, ExportMetadata
from mmcastling.runtime.preprocess import Prepared, prepare, read_image
from mmcastling.runtime.sessions import SUFFIXES, runtime_library
from mmcastling.version import __version__

ROUNDS = 3
"""Passes whose median is the latency that is printed."""

EXAMPLES = 16
"""Training images that show a quantiser what inputs are like."""


@dataclass(frozen=True)
class Latency:
    """Seconds of one pass at an input of ``(H, W)``.

    Attributes:
        size: The input's.
        torch: Of the model in eager mode.
        runtime: Of the file.
    """

    size: tuple[int, int]
    torch: float
    runtime: float


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        path: The file that was written.
        metadata: What it says about its model.
        runtime: What ran it.
        pruned: Attentions whose auxiliary branch was pruned.
        difference: Of features by pruning, or None where not measured.
        agreements: How far its outputs are from torch's, by input size.
        latencies: Seconds, by input size.
        rounded: How far a file in lower precision is from torch, by input size.
        examples: Training images that a quantiser took the steps of inputs from.
    """

    path: Path
    metadata: ExportMetadata
    runtime: str
    pruned: int
    difference: float | None
    agreements: tuple[Agreement, ...]
    latencies: tuple[Latency, ...]
    rounded: tuple[Agreement, ...] = ()
    examples: int = 0


def export(
    cfg: Config,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    format: str = "onnx",
    part: str = "model",
    opset: int = DEFAULT_OPSET,
    image: str | os.PathLike[str] | None = None,
    force: bool = False,
    ema: bool | None = None,
    precision: str = "fp32",
) -> ExportReport:
    """Write a model in a runtime's format, run the file, and compare it with torch.

    Args:
        cfg: The config, from :func:`mmcastling.run.load_config`.
        source: A checkpoint of it, of training or deployed.
        out: The file to write. Defaults to None (the checkpoint's name with the
            format's ending).
        format: One of :data:`mmcastling.export.FORMATS`. Defaults to ``'onnx'``.
        part: ``'model'`` or ``'backbone'``. Defaults to ``'model'``.
        opset: ONNX opset. Defaults to 18.
        image: The image to compare on. Defaults to None (the first of the test set).
        force: Go on although the masks have not decayed. Defaults to False.
        ema: See :func:`mmcastling.deploy.select_weights`. Defaults to None.
        precision: What products compute in, one of those that
            :data:`mmcastling.export.FORMAT_PRECISIONS` has for the format. What
            is compared and refused is the file in float32, and what rounding changes is
            reported. OpenVINO's ``'int8'`` takes the steps of inputs from training
            images, from the image compared on where there are none. Defaults to
            ``'fp32'``.

    Raises:
        CheckpointError: If the source cannot be read or does not fit, its masks have
            not decayed and ``force`` is not given, or the output cannot be written.
        ExportedModelError: If the runtime is missing or cannot run the file.
        UnsupportedModelError: If the model has no exportable form.
        ConfigError: If there is no image, or the file disagrees with torch; nothing is
            left of it then.
        ValueError, RuntimeError: If the format, its opset or precision is not
            supported, or a library that writes it is missing.
    """
    check_format(format, opset)
    check_export_precision(precision, format)
    runtime = SUFFIXES[FORMATS[format]][0]
    runtime_library(runtime)  # before minutes of work
    out = _destination(source, out, format)
    picture = read_image(_image(cfg, image))
    checkpoint = load_checkpoint(source)
    result = build_pruned(cfg, checkpoint, Path(source), force=force, ema=ema)
    model = result.model
    graph = export_graph(model, part)
    meta = describe(cfg, checkpoint, model, graph, part)
    meta = dataclasses.replace(meta, versions=_versions(format))
    inputs = list(_inputs(picture, meta))
    examples: list[Prepared] = []
    if (format, precision) == ("openvino", "int8"):
        examples = _training_inputs(cfg, meta)
    expected = [_expected(model, meta, x) for x in inputs]
    rounded: list[Agreement] = []
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            written = Path(folder) / out.name
            write(graph, written, meta, format, opset)
            inferencer = _open(written)
            agreements = _agreements(inferencer, inputs, expected)
            _refuse_unless_all_hold(agreements, runtime)
            if precision != "fp32":
                del inferencer  # it maps the file
                meta = dataclasses.replace(meta, precision=precision)
                if runtime == "torch":
                    write(_lowered(model, precision, part), written, meta, format)
                else:
                    lower(written, meta, [_feed(x, meta) for x in examples or inputs])
                inferencer = _open(written)
                rounded = _agreements(inferencer, inputs, expected, rounded=True)
            latencies = [_latency(model, inferencer, x) for x in inputs]
            del inferencer  # it maps the file
            _move(Path(folder), out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}") from error
    return ExportReport(
        out,
        meta,
        runtime,
        result.attentions,
        result.difference,
        tuple(agreements),
        tuple(latencies),
        tuple(rounded),
        len(examples),
    )


def _destination(
    source: str | os.PathLike[str], out: str | os.PathLike[str] | None, format: str
) -> Path:
    suffix = FORMATS[format]
    path = Path(source).with_suffix(suffix) if out is None else Path(out)
    if path.suffix != suffix:
        raise ConfigError(f"output {path} must end in {suffix}, as {format} files do")
    if not path.parent.is_dir():
        raise CheckpointError(
            f"cannot write {path}: the folder {path.parent} does not exist: create it"
        )
    for name in (path, path.with_suffix(".bin")) if format == "openvino" else (path,):
        if name.is_dir():
            raise CheckpointError(f"cannot write {name}: it is a folder")
    return path


def _image(cfg: Config, image: str | os.PathLike[str] | None) -> Path:
    if image is not None:
        return Path(image)
    if has_data(cfg, "test"):
        check_data(cfg, "test")
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        if len(dataset):
            record = dataset.get_data_info(0)
            return Path(record["img_path"])
    raise ConfigError(
        "the exported file is compared with torch on a real image, and the config's "
        "test data is not there: name an image with --image FILE"
    )


def _inputs(picture: np.ndarray, meta: ExportMetadata) -> Iterator[Prepared]:
    """The image as the pipeline makes it, and smaller, of another shape."""
    padded = _padded(meta)
    whole = prepare(picture, padded)
    # In pixels of the network, as outputs are compared.
    yield dataclasses.replace(whole, original=whole.size, scale=(1.0, 1.0))
    height, width = (
        max(meta.min_size, int(side * share))
        for side, share in zip(whole.size, (0.7, 0.8), strict=True)
    )
    step = dict(type="Resize", scale=(width, height), keep_ratio=False)
    smaller = prepare(picture, dataclasses.replace(padded, pipeline=(step,)))
    yield dataclasses.replace(smaller, original=smaller.size, scale=(1.0, 1.0))


def _training_inputs(cfg: Config, meta: ExportMetadata) -> list[Prepared]:
    """Training images as the file takes them; none where they are not there."""
    if not has_data(cfg, "train"):
        return []
    try:
        check_data(cfg, "train")
    except (DatasetError, CocoFormatError, SegmentationFormatError, ConfigError):
        return []
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    step = max(1, len(dataset) // EXAMPLES)
    chosen = range(0, len(dataset), step)[:EXAMPLES]
    records = map(dataset.get_data_info, chosen)
    paths = [Path(record.get("img_path", "")) for record in records]
    padded = _padded(meta)
    return [prepare(read_image(path), padded) for path in paths if path.is_file()]


def _padded(meta: ExportMetadata) -> ExportMetadata:
    """With images padded to what the graph takes."""
    divisor = math.lcm(meta.pad_divisor, meta.size_divisor)
    return dataclasses.replace(meta, pad_divisor=divisor)


def _feed(prepared: Prepared, meta: ExportMetadata) -> dict[str, np.ndarray]:
    feed = {"images": prepared.batch}
    if meta.kind == "detector":
        feed["image_size"] = np.array(prepared.size, np.int64)
    return feed


def _open(path: Path) -> ExportedInferencer:
    return ExportedInferencer(path, threads=torch.get_num_threads())


def _lowered(model: nn.Module, precision: str, part: str) -> nn.Module:
    """The graph of a copy whose layers compute in less, as torch's files hold them."""
    model = copy.deepcopy(model)
    set_precision(model, precision)
    return export_graph(model, part)


@torch.inference_mode()
def _expected(
    model: nn.Module, meta: ExportMetadata, prepared: Prepared
) -> dict[str, np.ndarray]:
    images = torch.from_numpy(prepared.batch)
    return reference_outputs(model, meta, images, prepared.size)


def _agreements(
    inferencer: ExportedInferencer,
    inputs: list[Prepared],
    expected: list[dict[str, np.ndarray]],
    rounded: bool = False,
) -> list[Agreement]:
    return [
        compare(
            outputs,
            inferencer.model(prepared.batch, prepared.size),
            inferencer.metadata,
            prepared.size,
            rounded,
        )
        for prepared, outputs in zip(inputs, expected, strict=True)
    ]


def _latency(
    model: nn.Module, inferencer: ExportedInferencer, prepared: Prepared
) -> Latency:
    passes = dict(
        torch=lambda: _expected(model, inferencer.metadata, prepared),
        runtime=lambda: inferencer.predict_prepared(prepared),
    )
    return Latency(tuple(prepared.batch.shape[2:]), **paired_medians(passes, ROUNDS))


def _refuse_unless_all_hold(agreements: list[Agreement], runtime: str) -> None:
    wrong = [str(agreement) for agreement in agreements if not agreement.holds]
    if wrong:
        raise ConfigError(
            f"the exported file disagrees with torch in {runtime} ({'; '.join(wrong)}) "
            "and has been removed: export in another --format or --opset, or the "
            "backbone alone with --part backbone"
        )


def _move(folder: Path, out: Path) -> None:
    """All that was written, the file that names the others last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == out.name):
        path.replace(out.parent / path.name)


def _versions(format: str) -> dict[str, str]:
    runtime = SUFFIXES[FORMATS[format]][0]
    names = {"torch", runtime, *(("onnx",) if format in ("onnx", "openvino") else ())}
    found = {name: package_metadata.version(name) for name in sorted(names)}
    return {"mmcastling": __version__, **found}
