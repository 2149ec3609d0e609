"""``mmcastling.export(model, "m.onnx", example)``: any module, as free as it can be."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmcastling.deploy import set_precision
from mmcastling.deploy.verify import tensors_in
from mmcastling.errors import OptionError
from mmcastling.export.agreement import Agreement, compare
from mmcastling.export.cases import (
    IMAGE_AXES,
    Case,
    cases_of,
    choices,
    first_line,
    free_axes,
    shape_text,
)
from mmcastling.export.formats import (
    DEFAULT_OPSET,
    FORMATS,
    UnsupportedModelError,
    check_format,
    lower,
    write,
)
from mmcastling.export.lowering import lower_file, precisions_to_write
from mmcastling.export.pools import replace_pools
from mmcastling.export.proving import destination, latency, write_proven
from mmcastling.runtime import SUFFIXES, ExportMetadata
from mmcastling.runtime.model import open_session, runtime_library
from mmcastling.verbs import castling_modules, switch_to_deploy
from mmcastling.version import __version__

logger = logging.getLogger("mmcastling")


@dataclass
class ExportReport:
    """What :func:`export` wrote.

    Attributes:
        path: The file.
        dynamic: What of an image batch's shape is free: of ``'batch'``, ``'height'``
            and ``'width'``.
        outputs: Names of the outputs.
        agreements: How far the file in float32 is from torch, by the shape of its first
            input.
        precision: What it computes in.
        lines: All that there is to say, as the command prints it.
    """

    path: Path
    dynamic: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    agreements: dict[str, Agreement] = field(default_factory=dict)
    precision: str = "fp32"
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Add a line."""
        self.lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class _Flat(nn.Module):
    """A module whose outputs are a tuple of tensors, and their names."""

    def __init__(self, module: nn.Module, example: tuple[Any, ...]) -> None:
        super().__init__()
        self.module = module
        self.outputs: tuple[str, ...] = ()
        with torch.no_grad():
            self.outputs = tuple(_names(module(*example)))

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.module(*inputs)))


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | Sequence[Tensor],
    *,
    opset: int = DEFAULT_OPSET,
    force: bool = False,
    precision: str = "fp32",
) -> ExportReport:
    """Write any module in a runtime's format, run the file, and compare it with torch.

    A castled model is deployed in a copy. Where the first input is a batch of images,
    its batch, height and width are free in the file, as far as the model takes other
    ones and the format can express it; what cannot be is said. The file is compared
    with torch at batches of 1 and 3 and at several sizes, one of them not square with
    tokens that would make a square, and is kept only if all agree.

    Args:
        model: Takes tensors; gives tensors, in tuples, lists or dicts.
        path: The file to write; its ending, one of those of
            :data:`mmcastling.export.FORMATS`, says the format.
        example: Its inputs, on the CPU: a tensor, or several.
        opset: Of ONNX. Defaults to 18.
        force: Go on although the masks have not decayed. Defaults to False.
        precision: One of those that :data:`mmcastling.export.FORMAT_PRECISIONS` has for
            the format. What is compared and refused is the file in float32, and what
            rounding changes is said. OpenVINO's ``'int8'`` takes the steps of inputs
            from the example. ``'auto'`` keeps the fastest here, by
            :func:`mmcastling.deploy.fastest`, of those near torch's outputs. Defaults
            to ``'fp32'``.

    Raises:
        UserError: If the path, the example or the runtime cannot be used, the masks
            have not decayed and ``force`` is not given, the model cannot be expressed
            in the format, or the file disagrees with torch; nothing is left of it then.
    """
    format = _format_of(Path(path))
    check_format(format, opset)
    to_write = precisions_to_write(precision, format)
    out = destination(path, format)
    runtime = SUFFIXES[out.suffix][0]
    runtime_library(runtime)  # before minutes of work
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise OptionError("example must be a tensor or several, the model's inputs")

    check_masks(model, force)
    report = ExportReport(out)
    module = _flattened(model, inputs)
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    run = functools.partial(_in_torch, module)
    cases = cases_of(run, convolutions, inputs, report.say)
    report.outputs = module.outputs
    for dynamic in choices(cases):
        tested = {at: case for at, case in cases.items() if case.free <= set(dynamic)}
        try:
            _write_one(
                *(module, tested, dynamic, out, opset, precision, to_write, report)
            )
            break
        except UnsupportedModelError as error:
            if not dynamic:
                raise
            what = ", ".join(dynamic)
            report.say(f"not with free {what}: {str(error).partition('. Choose')[0]}")
            logger.info("%s", report.lines[-1])
    what = f"{type(model).__name__} in {report.precision}"
    report.say(f"wrote {out}: {what}, {_freedom(report.dynamic)}")
    return report


def _freedom(dynamic: Sequence[str]) -> str:
    fixed = [name for name in IMAGE_AXES if name not in dynamic]
    parts = [("free", dynamic), ("fixed", fixed)]
    return "; ".join(f"{' and '.join(names)} {how}" for how, names in parts if names)


def check_masks(model: nn.Module, force: bool = False) -> None:
    """Raise OptionError where deploying would change what a castled model computes."""
    modules = castling_modules(model)
    on = [name for name, module in modules if getattr(module, "mask_is_on", False)]
    if on and not force:
        raise OptionError(
            f"the masks of {type(model).__name__} have not decayed ({on[0]} and "
            f"{len(on) - 1} more are on), and the file would compute something else: "
            "train until they are off, set_mask(model, 1.0), or go on with force"
        )


def _flattened(model: nn.Module, inputs: tuple[Tensor, ...]) -> _Flat:
    """The deployed module to trace."""
    deployed = switch_to_deploy(model).requires_grad_(False)
    deployed.eval()  # mmdet's backbones return nothing
    try:
        module = _Flat(deployed, inputs)
    except Exception as error:  # the model's own
        raise OptionError(
            f"{type(model).__name__} does not take the example: {first_line(error)}"
        ) from error
    if not module.outputs:
        raise OptionError(f"{type(model).__name__} gives no tensors for the example")
    replace_pools(module)
    return module


def _write_one(
    module: _Flat,
    cases: dict[str, Case],
    dynamic: tuple[str, ...],
    out: Path,
    opset: int,
    precision: str,
    to_write: tuple[Sequence[str], dict[str, str]],
    report: ExportReport,
) -> None:
    """Write, compare, lower and time with so much left free."""
    runtime = SUFFIXES[out.suffix][0]
    # Traced at no usual shape, so that nothing of it is kept.
    traced = max(cases.values(), key=lambda c: (len(c.free), c.inputs[0].numel()))
    expected = {at: _in_torch(module, case.inputs) for at, case in cases.items()}
    names = [f"input_{i}" for i in range(len(traced.inputs))]
    names[0] = "images" if traced.inputs[0].ndim == 4 else names[0]
    libraries = {"torch", runtime, *(("onnx",) if out.suffix != ".pt2" else ())}
    meta = ExportMetadata(
        kind="module",
        name=type(module.module).__name__,
        outputs=module.outputs,
        channels=traced.inputs[0].shape[1] if traced.inputs[0].ndim > 1 else 0,
        dynamic_batch="batch" in dynamic,
        versions={"mmcastling": __version__} | {n: version(n) for n in libraries},
    )

    def write_file(path: Path, module: _Flat = module, name: str = "fp32") -> None:
        write(
            module,
            path,
            traced.inputs,
            format=_format_of(out),
            inputs=names,
            outputs=module.outputs,
            dynamic_shapes=(free_axes(traced.inputs, dynamic),),
            metadata=dataclasses.replace(meta, precision=name).to_json(),
            opset=opset,
        )

    def write_lowered(name: str, path: Path) -> None:
        if out.suffix == FORMATS["exported-program"]:
            lowered = copy.deepcopy(module)
            set_precision(lowered.module, name)
            write_file(path, lowered, name)
            return
        first = next(iter(cases.values())).inputs
        feeds = [{n: x.numpy() for n, x in zip(names, first, strict=True)}]
        text = dataclasses.replace(meta, precision=name).to_json()
        lower(path.parents[1] / path.name, path, name, text, feeds)

    said: list[str] = []

    def agreements_of(path: Path, name: str = "fp32") -> dict[str, Agreement]:
        _, session = open_session(path, threads=torch.get_num_threads())
        against = f"{name if name != 'fp32' else runtime} against torch"
        found = {}
        for at, case in cases.items():
            got = _in_runtime(session, module, case.inputs)
            found[at] = compare(expected[at], got)
            said.append(f"{against} at {at}: {found[at]}")
        return found

    def run_of(path: Path, at: str) -> Callable[[], Any]:
        _, session = open_session(path, threads=torch.get_num_threads())
        return functools.partial(_in_runtime, session, module, cases[at].inputs)

    timed = [next(iter(cases)), *[at for at in cases if at.startswith("3x")][:1]]

    def lower_and_time(path: Path) -> Path:
        report.precision, chosen = lower_file(
            path,
            precision,
            to_write,
            make=write_lowered,
            compare=agreements_of,
            run_of=lambda file: run_of(file, timed[0]),
            size=tuple(cases[timed[0]].inputs[0].shape[2:]),
            say=said.append,
        )
        for at in timed:
            in_torch = functools.partial(_in_torch, module, cases[at].inputs)
            said.append(latency(at, runtime, in_torch, run_of(chosen, at)))
        return chosen

    report.agreements = write_proven(out, write_file, agreements_of, lower_and_time)
    report.dynamic = dynamic
    report.lines += said


@torch.inference_mode()
def _in_torch(module: _Flat, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    outputs = (x.numpy() for x in module(*inputs))
    return dict(zip(module.outputs, outputs, strict=True))


def _in_runtime(
    session: Any, module: _Flat, inputs: tuple[Tensor, ...]
) -> dict[str, np.ndarray]:
    arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]
    try:
        outputs = session.run(dict(zip(session.inputs, arrays, strict=True)))
    except Exception as error:  # each runtime has its own
        raise UnsupportedModelError(
            f"the file does not run at {shape_text(inputs)}: {first_line(error)}"
        ) from error
    return dict(zip(module.outputs, outputs, strict=True))


def _names(value: Any, name: str = "output") -> Iterator[str]:
    """A name for each tensor that :func:`tensors_in` finds."""
    if isinstance(value, Tensor):
        yield name
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _names(item, str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _names(item, f"{name}_{index}")


def _format_of(path: Path) -> str:
    for name, suffix in FORMATS.items():
        if path.suffix == suffix:
            return name
    raise OptionError(
        f"output {path} must end in one of {list(FORMATS.values())}, which say the "
        "format"
    )
