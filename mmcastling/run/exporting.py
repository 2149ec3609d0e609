"""Export a model and prove that the file computes the same: ``tools/export.py``."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import nn

from mmcastling.checkpoint import load_checkpoint
from mmcastling.deploy import set_precision
from mmcastling.errors import ConfigError, UserError
from mmcastling.export import (
    DEFAULT_FORMAT,
    DEFAULT_OPSET,
    FORMATS,
    Agreement,
    UnsupportedModelError,
    check_format,
    compare,
    compare_detections,
    describe,
    export_graph,
    lower,
    reference_outputs,
    write_graph,
)
from mmcastling.export.lowering import lower_file, precisions_to_write
from mmcastling.export.proving import destination, latency, write_proven
from mmcastling.run.config import (
    check_data,
    dataset_meta,
    datasets_of,
    has_data,
)
from mmcastling.run.load import load_pruned_model, preprocess
from mmcastling.run.pipelines import FilePipeline, runtime_steps
from mmcastling.run.runner import say_warnings
from mmcastling.runtime import (
    SUFFIXES,
    Classification,
    Detections,
    ExportedInferencer,
    ExportMetadata,
    Prediction,
)
from mmcastling.runtime.images import read_image
from mmcastling.runtime.model import runtime_library
from mmcastling.runtime.preprocess import Prepared, prepare
from mmcastling.version import __version__

EXAMPLES = 16  # training images that show a quantizer what inputs are like


def export(
    cfg: Config,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    format: str = DEFAULT_FORMAT,
    part: str = "model",
    opset: int = DEFAULT_OPSET,
    image: str | os.PathLike[str] | None = None,
    force: bool = False,
    ema: bool | None = None,
    precision: str = "fp32",
) -> ExportMetadata:
    """Write a model in a runtime's format, run the file, and compare it with torch.

    Prints what was pruned, how far the file is from torch, and its latency. Returns
    what the file says about its model.

    Args:
        cfg: The config, from :func:`mmcastling.run.load_config`.
        source: A checkpoint of it, of training or deployed.
        out: The file to write. Defaults to None (the checkpoint's name with the
            format's ending).
        format: One of :data:`mmcastling.export.FORMATS`, ONNX of this ``opset``.
        part: ``'model'`` or ``'backbone'``.
        image: The image to compare on. Defaults to None (the first of the test set).
        force: Go on although the masks have not decayed.
        ema: See :func:`mmcastling.deploy.select_weights`.
        precision: One of those that :data:`mmcastling.export.FORMAT_PRECISIONS` has for
            the format. What is compared and refused is the file in float32, and what
            rounding changes is printed. OpenVINO's ``'int8'`` takes the steps of inputs
            from training images, or the one compared on. ``'auto'`` writes a file in
            each and keeps the fastest here, by :func:`mmcastling.deploy.fastest`, of
            those near torch's outputs. Defaults to ``'fp32'``.

    Raises:
        UserError: If checkpoint, image, format or runtime cannot be used, the masks
            have not decayed and ``force`` is not given, or the file disagrees with
            torch; nothing is left of it then.
    """
    check_format(format, opset)
    to_write = precisions_to_write(precision, format)
    runtime = SUFFIXES[FORMATS[format]][0]
    runtime_library(runtime)  # before minutes of work
    out = destination(out or Path(source).with_suffix(FORMATS[format]), format)
    picture = _image(cfg, image)
    read_image(picture)  # which says so, where it cannot be read
    facts: dict[str, Any] = dict(pipeline=tuple(runtime_steps(cfg)))

    checkpoint = load_checkpoint(source)
    model, pruning = load_pruned_model(cfg, checkpoint, source, ema=ema)
    if pruning:
        if not force:
            pruning.refuse_if_changed(source)
        print(pruning)

    graph = export_graph(model, part)
    names = {"torch", runtime, *(("onnx",) if format in ("onnx", "openvino") else ())}
    versions = {"mmcastling": __version__} | {n: version(n) for n in sorted(names)}
    facts |= dict(versions=versions)
    if part != "backbone":
        facts |= _classes(cfg, checkpoint)
    meta = describe(model, graph, part, format, **facts)
    from_file = _from_file(cfg, model, meta, picture)
    inputs = list(_inputs(read_image(picture, meta), meta))
    expected = [_in_torch(model, meta, x) for x in inputs]

    def agreements_of(path: Path, precision: str = "fp32") -> dict[str, Agreement]:
        against = f"{precision} against torch in fp32"
        if not (rounded := precision != "fp32"):
            against = f"{runtime} against torch"
        inferencer = ExportedInferencer(path, threads=torch.get_num_threads())
        agreements = _compare(inferencer, inputs, expected, rounded)
        if from_file is not None and not rounded:
            found = inferencer.predict(picture)
            agreements[f"from {picture.name}"] = _agreement(from_file, found)
        for at, agreement in agreements.items():
            print(f"{against} {at}: {agreement}")
        return agreements

    def run_of(path: Path, x: Prepared) -> Callable[[], Prediction]:
        inferencer = ExportedInferencer(path, threads=torch.get_num_threads())
        return partial(inferencer.predict_prepared, x)

    def lower_and_time(path: Path) -> Path:
        nonlocal precision
        precision, chosen = lower_file(
            path,
            precision,
            to_write,
            make=lambda name, made: _lower(
                *(cfg, model, part, format),
                dataclasses.replace(meta, precision=name),
                *(path, made, inputs),
            ),
            compare=agreements_of,
            run_of=lambda file: run_of(file, inputs[0]),
            size=inputs[0].size,
            say=print,
        )
        for x in inputs:
            at = "{}x{}".format(*x.batch.shape[2:])
            in_torch = partial(_in_torch, model, meta, x)
            print(latency(at, runtime, in_torch, run_of(chosen, x)))
        return chosen

    write_proven(
        out,
        lambda path: write_graph(graph, path, meta, format, opset),
        agreements_of,
        lower_and_time,
    )
    print(f"wrote {out}: {meta.kind} {meta.name}")
    return dataclasses.replace(meta, precision=precision)


# -- what is read ----------------------------------------------------------------------


def _image(cfg: Config, image: str | os.PathLike[str] | None) -> Path:
    if image is not None:
        return Path(image)
    if has_data(cfg, "test"):
        say_warnings(check_data(cfg, "test"))
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        if len(dataset):
            return Path(dataset.get_data_info(0)["img_path"])
    raise ConfigError(
        "the exported file is compared with torch on a real image, and the config's "
        "test data is not there: name an image with --image FILE"
    )


def _inputs(picture: np.ndarray, meta: ExportMetadata) -> Iterator[Prepared]:
    """The image as the pipeline makes it, and smaller, of another shape."""
    padded = _padded(meta)
    whole = prepare(picture, padded)
    height, width = (
        max(meta.min_size, int(side * share))
        for side, share in zip(whole.size, (0.7, 0.8), strict=True)
    )
    step = dict(type="Resize", scale=(width, height), keep_ratio=False)
    smaller = prepare(picture, dataclasses.replace(padded, pipeline=(step,)))
    for prepared in (whole, smaller):  # in pixels of the network, as torch's outputs
        yield dataclasses.replace(prepared, original=prepared.size, scale=(1.0, 1.0))


def _training_inputs(cfg: Config, meta: ExportMetadata) -> list[Prepared]:
    """Training images as the file takes them; none where they are not there."""
    if not has_data(cfg, "train"):
        return []
    try:
        check_data(cfg, "train")
    except UserError:
        return []
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    step = max(1, len(dataset) // EXAMPLES)
    records = map(dataset.get_data_info, range(0, len(dataset), step)[:EXAMPLES])
    paths = [Path(record.get("img_path", "")) for record in records]
    return [prepare(read_image(p, meta), _padded(meta)) for p in paths if p.is_file()]


def _padded(meta: ExportMetadata) -> ExportMetadata:
    divisor = math.lcm(meta.pad_divisor, meta.size_divisor)
    return dataclasses.replace(meta, pad_divisor=divisor)


def _classes(cfg: Config, checkpoint: dict[str, Any]) -> dict[str, Any]:
    known = dataset_meta(next(datasets_of(cfg, "test"), {}), checkpoint)
    return dict(
        classes=tuple(map(str, known["classes"] or ())),
        palette=tuple(tuple(map(int, colour)) for colour in known["palette"] or ()),
    )


# -- what is compared ------------------------------------------------------------------


def _in_torch(model: nn.Module, meta: ExportMetadata, x: Prepared) -> dict[str, Any]:
    return reference_outputs(model, meta.kind, torch.from_numpy(x.batch), x.size)


def _from_file(
    cfg: Config, model: nn.Module, meta: ExportMetadata, picture: Path
) -> Any:
    """What the config's own pipeline and its model predict for a file: a data sample.

    None for a backbone, or where the config has no test pipeline.

    Raises:
        UnsupportedModelError: If the exported file would see another input.
    """
    if not next(datasets_of(cfg, "test"), {}).get("pipeline"):
        print("the config has no test pipeline: the file takes images as they are")
        return None
    pipeline = FilePipeline(cfg)
    item = pipeline(pipeline.read(picture))
    own = preprocess(model, copy.deepcopy(item)).cpu().numpy()
    batch = prepare(read_image(picture, meta), meta).batch
    apart = compare(dict(input=own), dict(input=batch))
    if not apart.holds:
        raise UnsupportedModelError(
            f"the config's own pipeline and data_preprocessor make an input "
            f"{own.shape} of {picture}, the runtime makes {batch.shape} ({apart}): set "
            "steps and options that it does, with --cfg-options, or export the part "
            "behind them by mmcastling.export.write"
        )
    fits = not any(side % meta.size_divisor for side in own.shape[2:])
    if meta.kind == "backbone" or not fits or min(own.shape[2:]) < meta.min_size:
        return None
    with torch.inference_mode():
        (sample,) = model.test_step(pseudo_collate([item]))
    return sample


def _agreement(sample: Any, found: Prediction) -> Agreement:
    """How far an exported file's prediction is from torch's, in the image's pixels."""
    if isinstance(found, Detections):
        names = dict(boxes="bboxes", scores="scores", labels="labels", masks="masks")
        expected = {
            ours: sample.pred_instances[name].cpu().numpy()
            for ours, name in names.items()
            if name in sample.pred_instances
        }
        return compare_detections(expected, vars(found), sample.ori_shape)
    if isinstance(found, Classification):
        expected, got = sample.pred_score, found.scores
    else:
        expected, got = sample.seg_logits.data, found.logits
        got = 1 / (1 + np.exp(-got)) if len(got) == 1 else got  # mmseg's, of one class
    return compare(dict(x=expected.cpu().numpy()), dict(x=got))


def _compare(
    inferencer: ExportedInferencer,
    inputs: list[Prepared],
    expected: list[dict[str, np.ndarray]],
    rounded: bool = False,
) -> dict[str, Agreement]:
    """How far a file is from torch, by where: ``'at HxW'``."""
    agreements, meta = {}, inferencer.metadata
    for x, outputs in zip(inputs, expected, strict=True):
        got = inferencer.model(x.batch, x.size)
        agreements["at {}x{}".format(*x.size)] = (
            compare_detections(outputs, got, x.size, meta.mask_threshold, rounded)
            if meta.kind == "detector"
            else compare(outputs, got)
        )
    return agreements


def _lower(
    cfg: Config,
    model: nn.Module,
    part: str,
    format: str,
    meta: ExportMetadata,
    path: Path,
    out: Path,
    inputs: list[Prepared],
) -> None:
    """Write a file in the precision of its metadata, from the one in float32."""
    if format == "exported-program":
        lowered = copy.deepcopy(model)
        set_precision(lowered, meta.precision)
        write_graph(export_graph(lowered, part), out, meta, format)
        return
    if (format, meta.precision) == ("openvino", "int8"):
        examples = _training_inputs(cfg, meta)
        inputs = examples or inputs
        number = f"{len(examples)} training images"
        none = "the image compared on, as there are no training images"
        print(f"int8: steps of inputs are from {number if examples else none}")
    feeds = [{"images": x.batch} for x in inputs]
    if meta.kind == "detector":
        for feed, x in zip(feeds, inputs, strict=True):
            feed["image_size"] = np.array(x.size, np.int64)
    lower(path, out, meta.precision, meta.to_json(), feeds)
