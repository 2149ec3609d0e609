"""One traced graph in each format that a runtime reads."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmcastling.checkpoint import CheckpointError
from mmcastling.deploy.export.boxes import UnsupportedModelError
from mmcastling.deploy.runtime import ExportMetadata
from mmcastling.deploy.runtime.metadata import METADATA_KEY

FORMATS = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "torchscript": ".torchscript",
    "exported-program": ".pt2",
}
"""The formats, and how the names of their files end."""

OPSETS = range(18, 24)
"""ONNX opsets that the exporter writes and the runtimes read."""

DEFAULT_OPSET = 18

PRECISIONS = ("fp32", "int8")
"""What the products of an exported file compute in."""

_NEEDED = {
    "onnx": ("onnx", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


def check_format(name: str, opset: int = DEFAULT_OPSET) -> None:
    """Check that a format is known, its opset supported and its libraries there.

    Raises:
        ValueError: If the format or the opset is not supported.
        RuntimeError: If a library is missing; says what to install.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r} is not known: choose one of {list(FORMATS)}")
    if opset not in OPSETS:
        raise ValueError(
            f"opset {opset} is not supported: choose one from {OPSETS[0]} to "
            f"{OPSETS[-1]}; without --opset it is {DEFAULT_OPSET}"
        )
    for library in _NEEDED.get(name, ()):
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise RuntimeError(
                f"format {name} needs {library} ({error}): pip install {library}"
            ) from error


def check_export_precision(precision: str, format: str) -> None:
    """Check that a precision is known, and that a format has it.

    Raises:
        ValueError: If not.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision {precision!r} is not one of exported files: choose one of "
            f"{list(PRECISIONS)}"
        )
    if precision == "int8" and format != "onnx":
        raise ValueError(
            f"precision int8 is for --format onnx, by onnxruntime, not for {format}: "
            "choose that, or fp32"
        )


def quantise(path: Path) -> None:
    """Turn the products of an ONNX file into 8-bit integers, in place.

    Weights are rounded once, with a step per output channel, to 7 bits: CPUs without
    integer dot products add pairs of products in 16 bits, which 8 would overflow.
    Inputs are rounded as they arrive. Convolutions stay float32.

    Args:
        path: A file that :func:`write` wrote.

    Raises:
        CheckpointError: If it cannot be written.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    passing = path.with_name(f"{path.stem}.int8{path.suffix}")
    root = logging.getLogger()  # which the library talks to
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            path,
            passing,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
        for left in path.parent.glob(f"{path.name}*"):  # weights beside it, too
            left.unlink()
        passing.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path.name}: {error}") from error
    finally:
        root.setLevel(level)


def write(
    graph: nn.Module,
    path: Path,
    metadata: ExportMetadata,
    name: str,
    opset: int = DEFAULT_OPSET,
) -> None:
    """Trace a graph and write it with its metadata.

    Args:
        graph: From :func:`~mmcastling.deploy.export.export_graph`.
        path: Where; OpenVINO's weights go beside it.
        metadata: What the file says about its model.
        name: The format.
        opset: Of ONNX, also on the way to OpenVINO. Defaults to 18.

    Raises:
        UnsupportedModelError: If torch or the format cannot express the graph.
        CheckpointError: If the file cannot be written, for example on a full disk.
    """
    with _quiet(), torch.no_grad():
        try:
            if name == "torchscript":
                save = _as_torchscript(graph, metadata)
            elif name == "exported-program":
                save = _as_program(graph, metadata)
            else:
                save = _as_onnx(graph, metadata, opset)
        except UnsupportedModelError:
            raise
        except Exception as error:  # of the tracer or the exporter
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UnsupportedModelError(
                f"{metadata.name} cannot be expressed as {name}: "
                f"{type(error).__name__}: {' '.join(lines)[:600]}. Choose another "
                "--format, or export the backbone alone with --part backbone"
            ) from error
        try:
            save(path if name != "openvino" else path.with_suffix(".onnx"))
            if name == "openvino":
                _convert_to_openvino(path, metadata)
        except Exception as error:  # each library has its own for a full disk
            raise CheckpointError(f"cannot write {path.name}: {error}") from error


def example_inputs(metadata: ExportMetadata) -> tuple[Tensor, ...]:
    """Inputs to trace with: of no usual size, so that nothing of it is kept."""
    unit = metadata.size_divisor
    side = -(-max(160, metadata.min_size) // unit) * unit
    height, width = side, side + max(unit, 64 // unit * unit)
    batch = 2 if metadata.dynamic_batch else 1
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, height, width, generator=generator)
    if metadata.kind == "detector":
        return images, torch.tensor([height, width])
    return (images,)


def trace(
    graph: nn.Module, inputs: tuple[Tensor, ...], metadata: ExportMetadata
) -> ExportedProgram:
    """The graph as torch's exported program, for any height and width."""
    free: dict[int, Any] = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if metadata.size_divisor > 1:
        unit = metadata.size_divisor
        free = {2: unit * Dim("rows"), 3: unit * Dim("columns")}
    if metadata.dynamic_batch:
        free[0] = Dim.DYNAMIC
    shapes = (free, *({} for _ in inputs[1:]))
    return torch.export.export(
        graph,
        inputs,
        dynamic_shapes=shapes,
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _as_onnx(
    graph: nn.Module, metadata: ExportMetadata, opset: int
) -> Callable[[Path], None]:
    inputs = example_inputs(metadata)
    exported = torch.onnx.export(
        trace(graph, inputs, metadata),
        dynamo=True,
        opset_version=opset,
        input_names=["images", "image_size"][: len(inputs)],
        output_names=list(metadata.outputs),
        verbose=False,
    )
    exported.model.metadata_props[METADATA_KEY] = metadata.to_json()
    return lambda path: exported.save(str(path))


def _convert_to_openvino(path: Path, metadata: ExportMetadata) -> None:
    import openvino

    passing = path.with_suffix(".onnx")
    model = openvino.convert_model(str(passing))
    model.set_rt_info(metadata.to_json(), [METADATA_KEY])
    openvino.save_model(model, str(path), compress_to_fp16=False)
    del model  # it maps the file
    for left in path.parent.glob(f"{passing.name}*"):
        left.unlink()


def _as_program(graph: nn.Module, metadata: ExportMetadata) -> Callable[[Path], None]:
    program = trace(graph, example_inputs(metadata), metadata)
    held = {f"{METADATA_KEY}.json": metadata.to_json()}
    return lambda path: torch.export.save(program, str(path), extra_files=held)


def _as_torchscript(
    graph: nn.Module, metadata: ExportMetadata
) -> Callable[[Path], None]:
    script = torch.jit.trace(graph, example_inputs(metadata), check_trace=False)
    held = {f"{METADATA_KEY}.json": metadata.to_json()}
    return lambda path: torch.jit.save(script, str(path), _extra_files=held)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell their own developers."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "nncf")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
