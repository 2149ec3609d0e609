"""An exported file as a function of a preprocessed batch, in the runtime of its format.

A session has the ``metadata`` text of its file (None without), the names of its
``inputs``, and ``run``: from arrays by name to a list of all outputs in order.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmcastling.runtime.metadata import (
    METADATA_KEY,
    ExportedModelError,
    ExportMetadata,
)


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
        self._compiled = compiled
        self._own = threading.local()  # a request holds one thread's inputs and outputs

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        request = self._own.request
        request.infer(feeds)
        outputs = map(request.get_output_tensor, range(len(self._compiled.outputs)))
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


_LOADING = threading.Lock()


@contextlib.contextmanager
def _data_alone() -> Iterator[None]:
    """Let torch refuse pickles that could run code, to which it else falls back."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # the one switch that reaches its loader
    with _LOADING:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


class ProgramSession:
    """torch's exported program, run by its graph in eager mode."""

    def __init__(self, path: Path, library: Any, threads: int | None) -> None:
        if threads not in (None, library.get_num_threads()):
            raise ExportedModelError(
                f"threads={threads}: torch has one number of threads for a whole "
                f"process, now {library.get_num_threads()}; leave the argument out and "
                "call torch.set_num_threads yourself"
            )
        with contextlib.suppress(ImportError):  # it registers nms and roi_align
            importlib.import_module("torchvision")
        texts = {f"{METADATA_KEY}.json": ""}
        with _data_alone():
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


RUNTIMES = {
    "onnxruntime": OnnxSession,
    "openvino": OpenVinoSession,
    "torch": ProgramSession,
}
"""What runs an exported file."""

SUFFIXES = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
}
"""What runs the files of each ending, the usual one first."""

_TORCHSCRIPT = ".torchscript"


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Whether a path ends as an exported file does, or once did."""
    return Path(path).suffix in (*SUFFIXES, _TORCHSCRIPT)


class ExportedModel:
    """A file that ``tools/export.py`` wrote; call it with a preprocessed batch.

    Args:
        path: ``.onnx``, ``.xml`` (OpenVINO, its ``.bin`` beside it) or ``.pt2``
            (torch's exported program).
        runtime: ``'onnxruntime'``, ``'openvino'`` or ``'torch'``, one that reads the
            format. Defaults to None (the format's own).
        threads: Threads of the CPU, which torch has for a whole process and not for
            a file. Defaults to None (the runtime's choice).

    Attributes:
        metadata: What the file says about its model.
        runtime: What runs it.
        path: The file.

    Raises:
        ExportedModelError: If the file is missing, damaged or no exported model, or
            the runtime is not installed or does not read its format.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        runtime: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        self._opened = self.path.absolute(), threads
        self.runtime, self._session = open_session(self.path, runtime, threads)
        self.metadata = ExportMetadata.from_json(self._session.metadata, str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its path: sessions cannot be."""
        path, threads = self._opened
        return type(self), (path, self.runtime, threads)

    def __call__(
        self, images: Any, image_size: tuple[int, int] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the network.

        Args:
            images: Normalized and padded images ``(B, C, H, W)``, an array or a
                tensor.
            image_size: ``(H, W)`` of the image inside a padded one, to which a
                detector clips its boxes. Defaults to None (all of it).

        Returns:
            The raw outputs by name, see :class:`ExportMetadata`.

        Raises:
            ExportedModelError: If the file cannot take images of this size, or the
                runtime fails.
        """
        images = np.ascontiguousarray(images, dtype=np.float32)
        self._check(images.shape)
        feeds = {self._session.inputs[0]: images}
        if self.metadata.kind == "detector":
            size = np.asarray(image_size or images.shape[-2:], dtype=np.int64)
            feeds[self._session.inputs[1]] = size
        try:
            outputs = self._session.run(feeds)
        except Exception as error:  # each runtime has its own
            raise ExportedModelError(
                f"{self.runtime} failed on {self.path} with an input of shape "
                f"{images.shape}: {error}"
            ) from error
        return dict(zip(self.metadata.outputs, outputs, strict=True))

    def _check(self, shape: tuple[int, ...]) -> None:
        meta = self.metadata
        if len(shape) != 4 or shape[1] != meta.channels:
            raise ExportedModelError(
                f"{self.path} takes images of shape (B, {meta.channels}, H, W), got "
                f"{shape}"
            )
        batch, _, height, width = shape
        if batch != 1 and not (meta.dynamic_batch and batch):
            several = " or more" if meta.dynamic_batch else ""
            raise ExportedModelError(
                f"{self.path} takes 1 image{several} at once, got {batch}: give them "
                "one by one"
            )
        if min(height, width) < meta.min_size or any(
            side % meta.size_divisor for side in (height, width)
        ):
            raise ExportedModelError(
                f"{self.path} cannot take an input of {height}x{width} pixels: height "
                f"and width must be at least {meta.min_size} and multiples of "
                f"{meta.size_divisor}; resize or pad the image"
            )


def open_session(
    path: Path, runtime: str | None = None, threads: int | None = None
) -> tuple[str, Any]:
    """The name of what runs a file, and the session; see :class:`ExportedModel`."""
    if runtime not in (None, *RUNTIMES):
        raise ExportedModelError(
            f"runtime {runtime!r} is not known: choose one of {list(RUNTIMES)}"
        )
    if path.suffix == _TORCHSCRIPT:
        raise ExportedModelError(
            f"{path} is TorchScript, which torch deprecates and mmcastling no longer "
            "reads: export the checkpoint again, with tools/export.py --format onnx, "
            "openvino or exported-program"
        )
    if not path.is_file():
        raise ExportedModelError(f"exported model {path} does not exist: check it")
    if path.suffix not in SUFFIXES:
        raise ExportedModelError(
            f"{path} is no exported model: expected a file that ends in one of "
            f"{list(SUFFIXES)}, as tools/export.py writes them"
        )
    readers = SUFFIXES[path.suffix]
    if runtime not in (None, *readers):
        raise ExportedModelError(
            f"{runtime} does not run {path.suffix} files such as {path}: choose one of "
            f"{list(readers)}, or export to its own format"
        )
    runtime = runtime or readers[0]
    library = runtime_library(runtime)
    try:
        return runtime, RUNTIMES[runtime](path, library, threads)
    except ExportedModelError:
        raise
    except Exception as error:  # whatever the parsers say of damaged bytes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportedModelError(
            f"{runtime} cannot load {path} ({path.stat().st_size} bytes): "
            f"{reason[0][:300]}. Copy it again, or export it again"
        ) from error
