"""Any torch module as a file that a runtime reads.

    write(module, path, example, format="onnx", outputs=["scores"])

:class:`mmcastling.runtime.ExportedModel` runs such a file, and
:func:`mmcastling.export.compare` says how far its outputs are from the module's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from mmcastling.deploy.precision import check_precision
from mmcastling.errors import OptionError, UnavailableError, UserError
from mmcastling.export.nncf_process import quantize_in_subprocess
from mmcastling.runtime.metadata import METADATA_KEY
from mmcastling.runtime.model import openvino_has_bf16

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "exported-program": ".pt2"}
"""The formats, and how the names of their files end."""

OPSETS = range(18, 24)
"""ONNX opsets that the exporter writes and the runtimes read."""

DEFAULT_OPSET = 18
DEFAULT_FORMAT = "onnx"

FORMAT_PRECISIONS = {
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "exported-program": ("fp32", "bf16", "fp16"),
}
"""What the products of a format's files may compute in."""

_LIBRARIES = {
    "onnx": ("onnx", "onnxscript"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "exported-program": (),
}


class UnsupportedModelError(UserError, ValueError):
    """A model, or a setting of it, that has no exportable form here."""


def check_format(name: str, opset: int = DEFAULT_OPSET) -> None:
    """Check that a format is known, its opset supported and its libraries there.

    Raises:
        ValueError: If the format or the opset is not supported.
        RuntimeError: If a library is missing; says what to install.
    """
    if name not in FORMATS:
        gone = "is gone, since torch deprecates TorchScript"
        what = gone if name == "torchscript" else "is not known"
        raise OptionError(f"format {name!r} {what}: choose one of {list(FORMATS)}")
    if opset not in OPSETS:
        raise OptionError(
            f"opset {opset} is not supported: choose one from {OPSETS[0]} to "
            f"{OPSETS[-1]}; without --opset it is {DEFAULT_OPSET}"
        )
    for library in _LIBRARIES[name]:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise UnavailableError(
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
        raise OptionError(
            f"precision {precision!r} is not one of exported files: choose one of "
            f"{sorted(set().union(*FORMAT_PRECISIONS.values()))}"
        )
    if format not in having:
        raise OptionError(
            f"precision {precision} is for --format {' or '.join(having)}, not for "
            f"{format}: choose that, or one of {list(FORMAT_PRECISIONS[format])}"
        )
    if format == "exported-program":
        check_precision(precision)
    elif (format, precision) == ("openvino", "int8"):
        if importlib.util.find_spec("nncf") is None:  # importing it changes torch
            raise UnavailableError(
                "precision int8 of openvino needs nncf: pip install nncf"
            )
    elif (format, precision) == ("openvino", "bf16"):
        import openvino

        if not openvino_has_bf16(openvino):
            raise UnavailableError(
                "precision bf16: OpenVINO finds no instructions for it in this CPU: "
                "choose fp32 or int8, or another machine"
            )


def write(
    module: nn.Module,
    path: Path,
    example: tuple[Tensor, ...],
    *,
    format: str,
    outputs: Sequence[str],
    inputs: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    metadata: str = "",
    opset: int = DEFAULT_OPSET,
) -> None:
    """Trace a module and write the graph.

    Args:
        module: Takes and returns tensors, in evaluation mode.
        path: Where; OpenVINO's weights go beside it, as ``.bin``.
        example: Inputs to trace with.
        format: One of :data:`FORMATS`.
        outputs: Names of the outputs.
        inputs: Names of the inputs. Defaults to None (those of ``forward``).
        dynamic_shapes: Which sizes of the inputs may change, as
            :func:`torch.export.export` takes it. Defaults to None (none).
        metadata: Text that the file keeps. Defaults to none.
        opset: Of ONNX, also on the way to OpenVINO. Defaults to 18.

    Raises:
        UnsupportedModelError: If torch or the format cannot express the module.
        OSError: If the file cannot be written, for example on a full disk.
    """
    # Else what holds of the example's sizes, that none is 1 and two are not equal, may
    # be asserted of all: a graph traced at two images would refuse one.
    any_size = fx_config.patch(backed_size_oblivious=True)
    with _quiet(), torch.no_grad(), any_size:
        try:
            graph: Any = torch.export.export(
                module,
                example,
                dynamic_shapes=dynamic_shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            if format != "exported-program":
                graph = torch.onnx.export(
                    graph,
                    dynamo=True,
                    opset_version=opset,
                    input_names=inputs,
                    output_names=outputs,
                    verbose=False,
                )
                graph.model.metadata_props[METADATA_KEY] = metadata
        except UnsupportedModelError:
            raise
        except Exception as error:  # of the tracer or the exporter
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UnsupportedModelError(
                f"the model cannot be expressed as {format}: {type(error).__name__}: "
                f"{' '.join(lines)[:600]}. Choose another --format, or export the "
                "backbone alone with --part backbone"
            ) from error
        with _as_os_error():
            if format == "exported-program":
                texts = {f"{METADATA_KEY}.json": metadata}
                torch.export.save(graph, str(path), extra_files=texts)
            elif format == "onnx":
                graph.save(str(path))
            else:
                _save_as_openvino(graph, path, metadata)


def _save_as_openvino(graph: Any, path: Path, metadata: str) -> None:
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder:
        passing = Path(folder) / "graph.onnx"
        graph.save(str(passing))
        model = openvino.convert_model(str(passing))
        _save_openvino(model, path, metadata)
        del model  # it maps the file


def _save_openvino(model: Any, path: Path, metadata: str) -> None:
    """Write an OpenVINO model in float32, with a text that the file keeps."""
    import openvino

    model.set_rt_info(metadata, [METADATA_KEY])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def lower(
    source: Path,
    out: Path,
    precision: str,
    metadata: str,
    feeds: Sequence[dict[str, np.ndarray]] = (),
) -> None:
    """Write an ONNX or OpenVINO file anew whose products compute in less than float32.

    ``'int8'`` is for products with constant weights; those of tokens with tokens stay
    float32, and so do convolutions. In ONNX, by onnxruntime, inputs are rounded as they
    arrive, with steps of their own, and weights once, to 7 bits: CPUs without integer
    dot products add pairs of products in 16 bits, which 8 would overflow. In OpenVINO,
    by NNCF, the steps of inputs are constant, from what they are on a few examples.
    ``'bf16'`` leaves an OpenVINO file in float32, whose metadata says that
    :class:`mmcastling.runtime.ExportedModel` shall compile it for bfloat16.

    Args:
        source: A file that :func:`mmcastling.export.write` wrote.
        out: The file to write, of the same ending.
        precision: What :func:`check_export_precision` accepts for the format.
        metadata: Text that the file keeps.
        feeds: Examples of inputs by name, for OpenVINO's int8.

    Raises:
        ValueError: If examples are missing.
        UnsupportedModelError: If a library cannot quantize the graph.
        OSError: If the file cannot be written.
    """
    try:
        with _quiet():
            if source.suffix == ".onnx":
                _int8_onnx(source, out, metadata)
            else:
                _lower_openvino(source, out, precision, metadata, feeds)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the quantizer
        raise UnsupportedModelError(
            f"{source.name} cannot be quantized to {precision}: "
            f"{type(error).__name__}: {str(error)[:600]}. Choose --precision fp32"
        ) from error


def _int8_onnx(source: Path, out: Path, metadata: str) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        out,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
    )
    model = onnx.load(out)
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata})
    onnx.save(model, out)


def _lower_openvino(
    source: Path,
    out: Path,
    precision: str,
    metadata: str,
    feeds: Sequence[dict[str, np.ndarray]],
) -> None:
    import openvino

    if precision == "int8" and not feeds:
        raise OptionError("precision int8 of OpenVINO needs examples of inputs")
    with tempfile.TemporaryDirectory() as folder:
        if precision == "int8":
            passing = Path(folder) / source.name
            quantize_in_subprocess(source, passing, feeds)
            source = passing
        # What is read is mapped, and stays when the folder goes.
        model = openvino.Core().read_model(str(source))
    with _as_os_error():
        _save_openvino(model, out, metadata)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """What libraries raise where a file cannot be written, each its own, as OSError."""
    try:
        yield
    except Exception as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters and quantizers tell their own developers."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", None)
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
