"""Any torch module as a file that a runtime reads.

    write(module, path, example, format="onnx", outputs=["scores"])

:class:`mmcastling.runtime.ExportedModel` runs such a file, and
:func:`mmcastling.export.compare` says how far its outputs are from the module's.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.errors import OptionError, UnavailableError, UserError
from mmcastling.runtime.metadata import METADATA_KEY

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "exported-program": ".pt2"}
"""The formats, and how the names of their files end."""

OPSETS = range(18, 24)
"""ONNX opsets that the exporter writes and the runtimes read."""

DEFAULT_OPSET = 18

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
    with quiet(), torch.no_grad():
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
        with as_os_error(path):
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
        save_openvino(model, path, metadata)
        del model  # it maps the file


def save_openvino(model: Any, path: Path, metadata: str) -> None:
    """Write an OpenVINO model in float32, with a text that the file keeps."""
    import openvino

    model.set_rt_info(metadata, [METADATA_KEY])
    openvino.save_model(model, str(path), compress_to_fp16=False)


@contextlib.contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """What libraries raise where a file cannot be written, each its own, as OSError."""
    try:
        yield
    except Exception as error:
        raise OSError(f"cannot write {path.name}: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
