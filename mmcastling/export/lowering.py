"""Exported files in lower precision."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmcastling.deploy.precision import check_precision
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.export.formats import (
    METADATA_KEY,
    UnsupportedModelError,
    as_os_error,
    quiet,
    save_openvino,
)
from mmcastling.export.nncf_process import quantize_in_subprocess
from mmcastling.runtime.sessions import openvino_has_bf16

FORMAT_PRECISIONS = {
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "exported-program": ("fp32", "bf16", "fp16"),
}
"""What the products of a format's files may compute in."""


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
        with quiet():
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
    with as_os_error(out):
        save_openvino(model, out, metadata)
