"""``mmcastling.export(model, "m.onnx", example)``: any module, as free as it can be."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from mmcastling.deploy.verify import tensors_in
from mmcastling.errors import OptionError
from mmcastling.export.agreement import Agreement, compare
from mmcastling.export.formats import (
    DEFAULT_OPSET,
    FORMATS,
    UnsupportedModelError,
    check_format,
    write,
)
from mmcastling.export.pools import replace_pools
from mmcastling.export.proving import destination, latency, write_proven
from mmcastling.runtime import SUFFIXES, ExportMetadata
from mmcastling.runtime.model import open_session, runtime_library
from mmcastling.verbs import castling_modules, switch_to_deploy
from mmcastling.version import __version__

logger = logging.getLogger("mmcastling")

_IMAGE_AXES = {"batch": 0, "height": 2, "width": 3}
# What may stay free, the most first.
_CHOICES = (("batch", "height", "width"), ("height", "width"), ("batch",), ())


@dataclass
class ExportReport:
    """What :func:`export` wrote.

    Attributes:
        path: The file.
        dynamic: What of an image batch's shape is free: of ``'batch'``, ``'height'``
            and ``'width'``.
        outputs: Names of the outputs.
        agreements: How far the file is from torch, by the shape of its first input.
        lines: All that there is to say, as the command prints it.
    """

    path: Path
    dynamic: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    agreements: dict[str, Agreement] = field(default_factory=dict)
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

    Raises:
        UserError: If the path, the example or the runtime cannot be used, the masks
            have not decayed and ``force`` is not given, the model cannot be expressed
            in the format, or the file disagrees with torch; nothing is left of it then.
    """
    format = _format_of(Path(path))
    check_format(format, opset)
    out = destination(path, format)
    runtime = SUFFIXES[out.suffix][0]
    runtime_library(runtime)  # before minutes of work
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise OptionError("example must be a tensor or several, the model's inputs")

    check_masks(model, force)
    report = ExportReport(out)
    module, cases = _prepared(model, inputs, report)
    report.outputs = module.outputs
    for dynamic in _choices(cases):
        tested = {at: case for at, case in cases.items() if case.free <= set(dynamic)}
        try:
            _write_one(module, tested, dynamic, out, opset, report)
            break
        except UnsupportedModelError as error:
            if not dynamic:
                raise
            what = ", ".join(dynamic)
            report.say(f"not with free {what}: {str(error).partition('. Choose')[0]}")
            logger.info("%s", report.lines[-1])
    report.say(f"wrote {out}: {type(model).__name__}, {_freedom(report.dynamic)}")
    return report


def _freedom(dynamic: Sequence[str]) -> str:
    fixed = [name for name in _IMAGE_AXES if name not in dynamic]
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


@dataclass
class _Case:
    """Inputs to compare at, and what has to be free for them."""

    inputs: tuple[Tensor, ...]
    free: set[str]


def _prepared(
    model: nn.Module, inputs: tuple[Tensor, ...], report: ExportReport
) -> tuple[_Flat, dict[str, _Case]]:
    """The module to trace, and inputs that it takes in torch."""
    deployed = switch_to_deploy(model).requires_grad_(False)
    deployed.eval()  # mmdet's backbones return nothing
    try:
        module = _Flat(deployed, inputs)
    except Exception as error:  # the model's own
        raise OptionError(
            f"{type(model).__name__} does not take the example: {_words(error)}"
        ) from error
    if not module.outputs:
        raise OptionError(f"{type(model).__name__} gives no tensors for the example")
    replace_pools(module)
    cases = {_shape(inputs): _Case(inputs, set())}
    first = inputs[0]
    if not (first.ndim == 4 and first.is_floating_point()):
        return module, cases
    batch, height, width = first.shape[0], *first.shape[2:]
    accepted: list[tuple[int, int]] = []
    refusal: Exception | None = None
    uneven = (height + 3, width + 5)
    for sizes in _sizes(module, height, width):
        for size in sizes:
            if size == uneven and not accepted:
                continue  # of a model that rounds it to the one size that it takes
            try:
                case = _Case(_resized(inputs, batch, size), {"height", "width"})
                _in_torch(module, case.inputs)
            except Exception as error:  # the model's own
                refusal = error
                continue
            cases[_shape(case.inputs)] = case
            accepted.append(size)
            break
    if not accepted:
        report.say(
            f"height and width fixed: the model refuses other images than "
            f"{height}x{width}: {_words(refusal)}"
        )
    for count in sorted({1, 3, 5} - {batch}):
        for size in [(height, width), *accepted[-1:]]:
            free = {"batch"} | ({"height", "width"} if size in accepted else set())
            try:
                case = _Case(_resized(inputs, count, size), free)
                _in_torch(module, case.inputs)
            except Exception as error:
                report.say(f"the model refuses {count} images: {_words(error)}")
                break
            cases[_shape(case.inputs)] = case
    return module, cases


def _sizes(
    module: nn.Module, height: int, width: int
) -> Iterator[list[tuple[int, int]]]:
    """Sizes to try, of each list the first that the model takes."""
    convs = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    steps = [*(m.stride[0] for m in [next(convs, None)] if m is not None), 32, 28]
    yield [(height + step, width + 2 * step) for step in steps]
    # What torch has assumed of the traced image shows at a higher one, a smaller one,
    # and one whose sides no patch divides.
    yield [(height + 2 * step, width) for step in steps]
    yield [(height - step, width - step) for step in steps if min(height, width) > step]
    yield [(height + 3, width + 5)]
    # What torch has assumed of the traced image shows at a higher one, a smaller one,
    # and one whose sides no patch divides.
    yield [(height + 2 * step, width) for step in steps]
    yield [(height - step, width - step) for step in steps if min(height, width) > step]
    yield [(height + 3, width + 5)]
    # 8 x 32 tokens are as many as 16 x 16.
    yield [(8 * step, 32 * step) for step in steps if step >= 8] + [(128, 512)]


def _resized(
    inputs: tuple[Tensor, ...], batch: int, size: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Inputs with other images, and as many rows of the others as there are images."""
    images, *others = inputs
    generator = torch.Generator().manual_seed(0)
    shape = (batch, images.shape[1], *size)
    new = torch.randn(shape, generator=generator).to(images.dtype)
    rows = torch.arange(batch) % len(images)
    others = [x[rows] if x.ndim and len(x) == len(images) else x for x in others]
    return new, *others


def _choices(cases: Mapping[str, _Case]) -> list[tuple[str, ...]]:
    possible = set().union(*(case.free for case in cases.values()))
    return [choice for choice in _CHOICES if set(choice) <= possible]


def _write_one(
    module: _Flat,
    cases: dict[str, _Case],
    dynamic: tuple[str, ...],
    out: Path,
    opset: int,
    report: ExportReport,
) -> None:
    """Write, compare and time with so much left free."""
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

    def write_file(path: Path) -> None:
        write(
            module,
            path,
            traced.inputs,
            format=_format_of(out),
            inputs=names,
            outputs=module.outputs,
            dynamic_shapes=(_free(traced.inputs, dynamic),),
            metadata=meta.to_json(),
            opset=opset,
        )

    def agreements_of(path: Path) -> dict[str, Agreement]:
        _, session = open_session(path, threads=torch.get_num_threads())
        return {
            at: compare(expected[at], _in_runtime(session, module, case.inputs))
            for at, case in cases.items()
        }

    times: list[str] = []
    timed = [next(iter(cases)), *[at for at in cases if at.startswith("3x")][:1]]

    def time(path: Path) -> Path:
        _, session = open_session(path, threads=torch.get_num_threads())
        for at, case in ((at, cases[at]) for at in timed):
            in_torch = lambda case=case: _in_torch(module, case.inputs)  # noqa: E731
            in_file = lambda case=case: _in_runtime(session, module, case.inputs)  # noqa: E731
            times.append(latency(at, runtime, in_torch, in_file))
        return path

    report.agreements = write_proven(out, write_file, agreements_of, time)
    report.dynamic = dynamic
    for at, agreement in report.agreements.items():
        report.say(f"{runtime} against torch at {at}: {agreement}")
    report.lines += times


def _free(inputs: tuple[Tensor, ...], dynamic: Sequence[str]) -> tuple[Any, ...]:
    """What :func:`torch.export.export` is told of each input."""
    images = {_IMAGE_AXES[name]: Dim.DYNAMIC for name in dynamic}
    rows = {0: Dim.DYNAMIC} if "batch" in dynamic else {}
    count = len(inputs[0])
    others = [rows if x.ndim and len(x) == count else {} for x in inputs[1:]]
    return (images, *others)


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
            f"the file does not run at {_shape(inputs)}: {_words(error)}"
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


def _shape(inputs: Sequence[Tensor]) -> str:
    return "x".join(map(str, inputs[0].shape))


def _words(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
