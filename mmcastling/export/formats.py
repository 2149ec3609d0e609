"""One traced graph in each format that a runtime reads."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmcastling.checkpoint import CheckpointError
from mmcastling.deploy.precision import check_precision
from mmcastling.export.boxes import UnsupportedModelError
from mmcastling.export.nncf_process import quantise_apart
from mmcastling.runtime import ExportMetadata
from mmcastling.runtime.metadata import METADATA_KEY
from mmcastling.runtime.sessions import openvino_has_bf16

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

FORMAT_PRECISIONS = {
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "torchscript": ("fp32", "bf16", "fp16"),
    "exported-program": ("fp32", "bf16", "fp16"),
}
"""What the products of a format's files may compute in."""

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
    """Check that a precision is known, that a format has it and that it can be made.

    Raises:
        ValueError: If not known, or not of this format.
        RuntimeError: If a library is missing, or this machine does not compute in it.
    """
    having = [name for name, known in FORMAT_PRECISIONS.items() if precision in known]
    if not having:
        raise ValueError(
            f"precision {precision!r} is not one of exported files: choose one of "
            f"{sorted(set().union(*FORMAT_PRECISIONS.values()))}"
        )
    if format not in having:
        raise ValueError(
            f"precision {precision} is for --format {' or '.join(having)}, not for "
            f"{format}: choose that, or one of {list(FORMAT_PRECISIONS[format])}"
        )
    if format in ("torchscript", "exported-program"):
        check_precision(precision)
    elif (format, precision) == ("openvino", "int8"):
        if importlib.util.find_spec("nncf") is None:  # importing it changes torch
            raise RuntimeError(
                "precision int8 of openvino needs nncf: pip install nncf"
            )
    elif (format, precision) == ("openvino", "bf16"):
        import openvino

        if not openvino_has_bf16(openvino):
            raise RuntimeError(
                "precision bf16: OpenVINO finds no instructions for it in this CPU: "
                "choose fp32 or int8, or another machine"
            )


def lower(
    path: Path, metadata: ExportMetadata, feeds: Sequence[dict[str, np.ndarray]] = ()
) -> None:
    """Let the products of an ONNX or OpenVINO file compute in less than float32.

    ``'int8'`` is for products with constant weights; those of tokens with tokens stay
    float32, and so do convolutions. In ONNX, by onnxruntime, inputs are rounded as they
    arrive, with steps of their own, and weights once, to 7 bits: CPUs without integer
    dot products add pairs of products in 16 bits, which 8 would overflow. In OpenVINO,
    by NNCF, the steps of inputs are constant, from what they are on a few examples.
    ``'bf16'`` leaves an OpenVINO file in float32 and says in its metadata that
    :func:`mmcastling.runtime.load_exported` shall compile it for bfloat16.

    Args:
        path: A file that :func:`write` wrote; it is replaced.
        metadata: What the file says from then on, with the precision.
        feeds: Examples of inputs by name, for OpenVINO's int8.

    Raises:
        ValueError: If a file of this kind has no such precision, or examples miss.
        UnsupportedModelError: If a library cannot quantise the graph.
        CheckpointError: If the file cannot be written.
    """
    key = (path.suffix, metadata.precision)
    if key not in _LOWER:
        raise ValueError(
            f"precision {metadata.precision} for {path.name}: {path.suffix} files are "
            f"written in one of {[name for end, name in _LOWER if end == path.suffix]}"
        )
    passing = path.with_name(f"{path.stem}.lower{path.suffix}")
    with _quiet():
        try:
            save = _LOWER[key](path, metadata, feeds)
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the quantiser
            raise UnsupportedModelError(
                f"{metadata.name} cannot be quantised to {metadata.precision}: "
                f"{type(error).__name__}: {str(error)[:600]}. Choose --precision fp32"
            ) from error
        try:
            save(passing)
            for suffix in (".bin", path.suffix):  # the file that names the other last
                made = passing.with_suffix(suffix)
                if made.exists():
                    made.replace(path.with_suffix(suffix))
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        except Exception as error:  # each library has its own for a full disk
            raise CheckpointError(f"cannot write {path.name}: {error}") from error


def _int8_onnx(
    path: Path, metadata: ExportMetadata, _: Sequence[Any]
) -> Callable[[Path], None]:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def save(out: Path) -> None:
        root = logging.getLogger()  # which the library talks to
        level = root.level
        root.setLevel(logging.ERROR)
        try:
            quantize_dynamic(
                path,
                out,
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
            )
        finally:
            root.setLevel(level)
        model = onnx.load(out)
        onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
        onnx.save(model, out)

    return save


def _bf16_openvino(
    path: Path, metadata: ExportMetadata, _: Sequence[Any]
) -> Callable[[Path], None]:
    import openvino

    model = openvino.Core().read_model(str(path))
    return lambda out: _save_openvino(model, out, metadata)


def _int8_openvino(
    path: Path, metadata: ExportMetadata, feeds: Sequence[dict[str, np.ndarray]]
) -> Callable[[Path], None]:
    import openvino

    if not feeds:
        raise ValueError("precision int8 of OpenVINO needs examples of inputs")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        quantise_apart(path, made, feeds)
        # What is read is mapped, and stays when the folder goes.
        model = openvino.Core().read_model(str(made))
    return lambda out: _save_openvino(model, out, metadata)


def _save_openvino(model: Any, out: Path, metadata: ExportMetadata) -> None:
    import openvino

    model.set_rt_info(metadata.to_json(), [METADATA_KEY])
    openvino.save_model(model, str(out), compress_to_fp16=False)


_LOWER: dict[tuple[str, str], Callable[..., Callable[[Path], None]]] = {
    (".onnx", "int8"): _int8_onnx,
    (".xml", "int8"): _int8_openvino,
    (".xml", "bf16"): _bf16_openvino,
}


def write(
    graph: nn.Module,
    path: Path,
    metadata: ExportMetadata,
    name: str,
    opset: int = DEFAULT_OPSET,
) -> None:
    """Trace a graph and write it with its metadata.

    Args:
        graph: From :func:`~mmcastling.export.export_graph`.
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
    _save_openvino(model, path, metadata)
    del model  # it maps the file
    for left in (passing, passing.with_name(f"{passing.name}.data")):
        left.unlink(missing_ok=True)


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
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
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
