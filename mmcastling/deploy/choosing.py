"""Which precision is the fastest on the machine at hand: measured once, remembered."""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcastling.analysis import input_channels, paired_medians
from mmcastling.analysis.data_sample import check_size, whole_pass
from mmcastling.analysis.machine import available_bytes, environment, estimated_peak
from mmcastling.analysis.timing import repeats_within
from mmcastling.checkpoint import write_json_atomically
from mmcastling.deploy.precision import (
    PRECISIONS,
    check_lowerable,
    check_precision,
    gains_nothing,
    set_precision,
)
from mmcastling.deploy.verify import difference_of, features
from mmcastling.errors import OptionError, UnavailableError, UserError
from mmcastling.files import default_cache

logger = logging.getLogger("mmcastling")

AUTO = "auto"
"""The name that stands for the precision that is chosen here."""

GAIN = 0.9
"""Of the time of a more exact precision, what a less exact one may take at most."""

NEAR = 0.1
"""How far features may be from float32's, as a share of the largest."""

SECONDS = 4.0
"""For the passes of one precision, beyond the fewest that make a median."""


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision, and why it was chosen.

    Attributes:
        precision: One of :data:`PRECISIONS`.
        seconds: Median of a pass, by each precision that was measured.
        left_out: Why others were not.
        size: ``(H, W)`` of the image.
        date: The day on which it was measured, None for now.
    """

    precision: str
    seconds: dict[str, float]
    left_out: dict[str, str]
    size: tuple[int, int]
    date: str | None = None

    def __str__(self) -> str:
        times = {name: f"{1e3 * value:.4g}" for name, value in self.seconds.items()}
        chosen = times.pop(self.precision)
        text = ", ".join(f"{name} {value}" for name, value in times.items())
        if text and self.precision == PRECISIONS[0]:
            text += f": none takes at most {GAIN:.0%} of its time"
        when = f"as measured on {self.date}" if self.date else "measured now"
        out = "".join(f"; {name} {why}" for name, why in self.left_out.items())
        return (
            f"--precision auto: {self.precision} ({chosen} ms{'; ' * bool(text)}{text})"
            f" at {self.size[0]}x{self.size[1]}, {when}{out}"
        )


def fastest(seconds: Mapping[str, float]) -> str:
    """The precision to take: from the most exact to the least, each that is notably
    faster, by :data:`GAIN`, than the one taken before."""
    first, *others = [name for name in PRECISIONS if name in seconds]
    for name in others:
        if seconds[name] <= GAIN * seconds[first]:
            first = name
    return first


def best_precision(
    model: nn.Module, size: Sequence[int], *, remember: bool = True
) -> PrecisionChoice:
    """The precision in which a deployed model is the fastest on this machine.

    Passes of one image of noise are timed in turns, in float32 and each precision that
    the machine's instructions speed up, of a detector or segmentor with its neck and
    heads and without what decodes. Taken is the fastest that is notably faster and
    whose features stay near float32's. What it was is kept for this machine, its
    number of threads, torch, model and size in ``precision.json`` in the user's cache
    folder; delete the file to measure anew.

    Args:
        model: As for :func:`set_precision`; it is not changed.
        size: ``(H, W)`` of the image as the network sees it.
        remember: Take what was measured before. Defaults to True.

    Raises:
        OptionError: If the model has an auxiliary branch or is in a lower precision, or
            refuses the size.
        UnavailableError: If such a pass does not fit into memory.
    """
    check_size(size)
    height, width = map(int, size)
    check_lowerable(model, AUTO)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    key = _key(model, (height, width), device)
    if remember and (found := _remembered(key)):
        return found
    names, left_out = ["fp32"], {}
    for name in PRECISIONS[1:]:
        try:
            check_precision(name, device)
        except UserError:
            kind = "is for CPUs" if name == "int8" else "has no instructions here"
            left_out[name] = kind
        else:
            if gains_nothing(name, device):
                left_out[name] = "gains nothing here"
            else:
                names.append(name)
    generator = torch.Generator().manual_seed(0)
    shape = (1, input_channels(model), height, width)
    _check_memory(model, shape, device, len(names))
    images = torch.randn(shape, generator=generator).to(device)
    models, expected, once = {}, [], 0.0
    for name in names:
        lowered = copy.deepcopy(model)
        lowered.eval()  # some of mmdet's return nothing
        set_precision(lowered, name)
        start = time.perf_counter()
        try:
            outputs = features(lowered, images)
        except Exception as error:  # the model's own
            raise OptionError(
                f"{type(model).__name__} refuses an image of {height}x{width} in "
                f"{name}: {type(error).__name__}: {str(error).strip()[:300]}. Choose "
                "another size, or name a precision"
            ) from error
        if name == "fp32":
            expected, once = outputs, time.perf_counter() - start
        difference, largest = difference_of(expected, outputs)
        if name == "fp32" or difference <= NEAR * largest:  # not where it is NaN
            models[name] = lowered
        else:
            share = f"{difference / (largest or 1.0):.1%} of the largest feature"
            left_out[name] = f"is off by {share}, more than {NEAR:.0%}"
    run = whole_pass(images)
    passes = {name: functools.partial(run, lowered) for name, lowered in models.items()}
    with torch.inference_mode():  # weights were rounded outside of it
        seconds = paired_medians(passes, repeats_within(SECONDS, once))
    choice = PrecisionChoice(fastest(seconds), seconds, left_out, (height, width))
    _remember(key, choice)
    return choice


def _check_memory(
    model: nn.Module, shape: tuple[int, ...], device: torch.device, copies: int
) -> None:
    """Raise an UnavailableError where passes and copies of the model do not fit."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    copied = copy.deepcopy(model)  # which may keep what passes, as tables by size
    copied.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.empty(shape, device=device)
            needed = estimated_peak(functools.partial(features, copied), fake)
    except Exception:  # what the model does depends on its input
        return
    held = [*model.parameters(), *model.buffers()]
    needed += 2 * copies * sum(x.numel() * x.element_size() for x in held)
    free = available_bytes(device)
    if free is not None and needed > free:
        raise UnavailableError(
            f"size {shape[2]}x{shape[3]} does not fit into memory: "
            f"{copies} precisions of {type(model).__name__} need about "
            f"{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free: choose a "
            "smaller size, or name a precision"
        )


# -- what is remembered ----------------------------------------------------------------


def _key(model: nn.Module, size: tuple[int, int], device: torch.device) -> str:
    """Whatever the times depend on, but for what else the machine does."""
    instructions = sorted(torch.cpu.get_capabilities().items())
    shapes = [(name, tuple(value.shape)) for name, value in model.named_parameters()]
    layers = re.sub(r" at 0x\w+", "", repr(model))
    facts = (environment(str(device)), instructions, layers, shapes, size)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _file() -> Path:
    return default_cache() / "precision.json"


def _entries() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):  # none, or a damaged one
        return {}
    return found if isinstance(found, dict) else {}


def _remembered(key: str) -> PrecisionChoice | None:
    try:
        choice = PrecisionChoice(**_entries()[key])
        size = (int(choice.size[0]), int(choice.size[1]))
        choice = PrecisionChoice(**{**asdict(choice), "size": size})
        return choice if choice.precision in PRECISIONS and str(choice) else None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _remember(key: str, choice: PrecisionChoice) -> None:
    today = datetime.date.today().isoformat()
    entry = {**asdict(choice), "date": today}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(_file(), {**_entries(), key: entry})
    except (OSError, UserError) as error:
        logger.warning("the precision that was chosen is not remembered: %s", error)
