"""The runtimes behind one contract: named arrays in, a list of arrays out."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmcastling.runtime.metadata import METADATA_KEY, ExportedModelError

RUNTIMES = ("onnxruntime", "openvino", "torch")
"""What runs an exported file."""

SUFFIXES = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".torchscript": ("torch",),
    ".pt2": ("torch",),
}
"""What runs the files of each ending, the usual one first."""


class Session(Protocol):
    """A loaded graph."""

    metadata: str | None
    inputs: tuple[str, ...]

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs in order."""


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a path ends as an exported file does."""
    return Path(path).suffix in SUFFIXES


def open_session(path: Path, runtime: str | None, threads: int | None) -> Session:
    """Load a file into a runtime.

    Args:
        path: The exported file.
        runtime: One of :data:`RUNTIMES`, or None for the usual one of its format.
        threads: Threads of the CPU, or None for the runtime's own choice.

    Raises:
        ExportedModelError: If the file is missing, damaged or no exported model, or
            the runtime is not installed or does not read its format.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise ExportedModelError(
            f"runtime {runtime!r} is not known: choose one of {list(RUNTIMES)}"
        )
    if not path.is_file():
        raise ExportedModelError(f"exported model {path} does not exist: check it")
    if path.suffix not in SUFFIXES:
        raise ExportedModelError(
            f"{path} is no exported model: expected a file that ends in one of "
            f"{list(SUFFIXES)}, as tools/export.py writes them"
        )
    if runtime is not None and runtime not in SUFFIXES[path.suffix]:
        raise ExportedModelError(
            f"{runtime} does not run {path.suffix} files such as {path}: choose one of "
            f"{list(SUFFIXES[path.suffix])}, or export to its own format"
        )
    runtime = runtime or SUFFIXES[path.suffix][0]
    library = runtime_library(runtime)
    kinds = {"onnxruntime": OnnxSession, "openvino": OpenVinoSession}
    kinds["torch"] = TorchScriptSession if path.suffix != ".pt2" else ProgramSession
    try:
        return kinds[runtime](path, library, threads)
    except ExportedModelError:
        raise
    except Exception as error:  # whatever the parsers say of damaged bytes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportedModelError(
            f"{runtime} cannot load {path} ({path.stat().st_size} bytes): "
            f"{reason[0][:300]}. Copy it again, or export it again"
        ) from error


def runtime_library(name: str) -> Any:
    """The library of a runtime.

    Raises:
        ExportedModelError: If it is not installed; says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportedModelError(
            f"{name} is not installed ({error}): pip install {name}"
        ) from error


class OnnxSession:
    """onnxruntime on the CPU."""

    def __init__(self, path: Path, library: Any, threads: int | None) -> None:
        options = library.SessionOptions()
        options.log_severity_level = 3  # errors; it warns of each folded constant
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        self._session = library.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        found = self._session.get_modelmeta().custom_metadata_map
        self.metadata = found.get(METADATA_KEY)
        self.inputs = tuple(item.name for item in self._session.get_inputs())

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(None, feeds)


class OpenVinoSession:
    """OpenVINO on the CPU, in float32 unless the file says otherwise."""

    def __init__(self, path: Path, library: Any, threads: int | None) -> None:
        core = library.Core()
        model = core.read_model(str(path))
        self.metadata = _rt_info(model)
        in_bf16 = _says_bf16(self.metadata)
        if in_bf16 and not openvino_has_bf16(library):
            raise ExportedModelError(
                f"{path} was exported with --precision bf16, for which OpenVINO finds "
                "no instructions in this CPU: export it in fp32 or int8"
            )
        # Where it can, the plugin would else compute in bfloat16 by itself.
        config = {
            "INFERENCE_PRECISION_HINT": "bf16" if in_bf16 else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        compiled = core.compile_model(model, "CPU", config)
        self.inputs = tuple(port.get_any_name() for port in compiled.inputs)
        self._request = compiled.create_infer_request()
        self._count = len(compiled.outputs)

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self._request.infer(feeds)
        outputs = map(self._request.get_output_tensor, range(self._count))
        return [np.array(output.data) for output in outputs]  # its memory is reused


def openvino_has_bf16(library: Any) -> bool:
    """Whether OpenVINO finds bfloat16 instructions in this CPU."""
    found = library.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in found


def _rt_info(model: Any) -> str | None:
    for path in ([METADATA_KEY], ["framework", METADATA_KEY]):
        if model.has_rt_info(path):
            value = model.get_rt_info(path)
            return str(getattr(value, "value", value))
    return None


def _says_bf16(metadata: str | None) -> bool:
    try:
        return json.loads(metadata or "")["precision"] == "bf16"
    except (KeyError, TypeError, ValueError):
        return False  # whoever reads the rest will say what is wrong with it


class _TorchSession:
    inputs: tuple[str, ...]

    def __init__(self, library: Any, threads: int | None) -> None:
        self._torch = library
        if threads is not None:
            library.set_num_threads(threads)

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        tensors = [self._torch.from_numpy(feeds[name]) for name in self.inputs]
        with self._torch.inference_mode():
            outputs = self._module(*tensors)
        return [output.numpy() for output in outputs]


class TorchScriptSession(_TorchSession):
    """torch's interpreter of scripts."""

    def __init__(self, path: Path, library: Any, threads: int | None) -> None:
        super().__init__(library, threads)
        importlib.import_module("torchvision")  # registers nms and roi_align
        held = {f"{METADATA_KEY}.json": ""}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have programs
            self._module = library.jit.load(str(path), "cpu", _extra_files=held)
        self.metadata = _text(held[f"{METADATA_KEY}.json"])
        names = [value.debugName() for value in self._module.graph.inputs()]
        self.inputs = tuple(names[1:])  # the first is the module itself


class ProgramSession(_TorchSession):
    """torch's exported program, run by its graph in eager mode."""

    def __init__(self, path: Path, library: Any, threads: int | None) -> None:
        super().__init__(library, threads)
        importlib.import_module("torchvision")
        held = {f"{METADATA_KEY}.json": ""}
        program = library.export.load(str(path), extra_files=held)
        self.metadata = _text(held[f"{METADATA_KEY}.json"])
        self.inputs = tuple(program.graph_signature.user_inputs)
        self._module = program.module()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
