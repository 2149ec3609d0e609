"""The runtimes behind one contract.

A session has the ``metadata`` text of its file (None without), the names of its
``inputs``, and ``run``: from arrays by name to a list of all outputs in order.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from mmcastling.runtime.metadata import METADATA_KEY, ExportedModelError


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
        in_bf16 = json.loads(self.metadata or "{}").get("precision") == "bf16"
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


class ProgramSession:
    """torch's exported program, run by its graph in eager mode."""

    def __init__(self, path: Path, library: Any, threads: int | None) -> None:
        if threads is not None:
            library.set_num_threads(threads)
        importlib.import_module("torchvision")  # registers nms and roi_align
        texts = {f"{METADATA_KEY}.json": ""}
        program = library.export.load(str(path), extra_files=texts)
        (text,) = texts.values()
        self.metadata = text.decode() if isinstance(text, bytes) else text
        self.inputs = tuple(program.graph_signature.user_inputs)
        self._module = program.module()
        self._torch = library

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        tensors = [self._torch.from_numpy(feeds[name]) for name in self.inputs]
        with self._torch.inference_mode():
            return [output.numpy() for output in self._module(*tensors)]
