"""Whether castling a model pays, measured on the machine at hand."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mmcastling.analysis.complexity import SELF, count_macs
from mmcastling.analysis.data_sample import check_size, input_channels
from mmcastling.analysis.diagnosis import Diagnosis, Measured, Size, Stage, size_text
from mmcastling.analysis.machine import PeakMemory, environment
from mmcastling.analysis.timing import paired_medians, repeats_within, synchronize
from mmcastling.attention import TokenMixer
from mmcastling.castle import CastleReport, castle
from mmcastling.errors import OptionError, UnavailableError
from mmcastling.verbs import switch_to_deploy

logger = logging.getLogger("mmcastling")

DEFAULT_SIZES: tuple[Size, ...] = ((224, 224), (512, 512), (800, 1344))
BETWEEN = (0.25, 0.375, 0.5, 0.75)
"""Sides of further images, for the curve, as shares of the largest's."""
SECONDS = 2.0
"""For the passes of one size, beyond the fewest that make a median."""
LONG = 8.0
"""Seconds before and after together beyond which two passes of each will do."""

Groups = dict[str, list[tuple[int, int]]]
"""Of each castled attention's passes, how many groups of how many tokens attend."""


def doctor(
    model: nn.Module,
    sizes: Sequence[Size] = (),
    *,
    say: Callable[[str], Any] | None = None,
    **attention: Any,
) -> Diagnosis:
    """Measure whether castling a model pays, and what it would change.

    The model is not changed: a copy is castled and deployed, whose weights are not
    trained, which times do not depend on. Times are medians of forward passes of one
    image, before and after in turns. Peak memory is that of the process in its first
    pass at a size, beyond what it held before, or of the allocator on a GPU.

    Args:
        model: Takes images ``(B, C, H, W)``. Of a detector or segmentor of OpenMMLab
            the backbone alone is measured.
        sizes: Pairs ``(H, W)``. Further ones are added for the curve, where the model
            takes them. Defaults to none (224x224, 512x512 and 800x1344, those of them
            that it takes).
        say: Called with a line on what is being done. Defaults to None (it is
            logged).
        **attention: As in :func:`mmcastling.castle`, ``stages`` and ``keep`` too.

    Raises:
        OptionError: If a size is not positive, or the model refuses it.
        UnavailableError: If there is nothing in the model to castle.
    """
    for size in sizes:
        check_size(size)
    name = type(model).__name__
    if hasattr(model, "data_preprocessor") and hasattr(model, "backbone"):
        model, name = model.backbone, f"{type(model.backbone).__name__} of {name}"
    before = copy.deepcopy(model).requires_grad_(False)
    before.eval()  # mmdet's backbones return nothing
    after = copy.deepcopy(before)
    try:
        _, report = castle(after, return_report=True, **{"deploy": True, **attention})
    except OptionError as error:
        raise UnavailableError(f"do not castle this: {error}") from error
    switch_to_deploy(after, inplace=True)
    after.eval()
    models = (before, after)
    machine = environment(_device(model).type)
    with contextlib.suppress(OSError, AttributeError):
        machine["load"] = round(os.getloadavg()[0], 1)
    with torch.inference_mode():
        asked = accepted_sizes(before, sizes or DEFAULT_SIZES, strict=bool(sizes))
        largest = max(asked, key=math.prod)
        extra = [_scaled(largest, share) for share in BETWEEN]
        extra = [s for s in dict.fromkeys(extra) if s not in asked]
        measured = []
        for one in models:  # what torch sets up once is none of a size's memory
            one(_image(one, min(asked, key=math.prod)))
        for size in sorted({*asked, *extra}, key=math.prod):
            (say or logger.info)(f"measuring at {size_text(size)}")
            try:
                measured.append(_measure(models, size, size in asked, report))
            except Exception:
                if size in asked:
                    raise
    return Diagnosis(name, machine, report, measured, _crossing(measured))


def accepted_sizes(
    model: nn.Module, sizes: Sequence[Size], strict: bool = True
) -> list[Size]:
    """Those of some image sizes ``(H, W)`` that a model takes.

    Raises:
        OptionError: If ``strict`` and it refuses one, or if it refuses all.
    """
    accepted, refusal = [], ""
    for size in dict.fromkeys((int(height), int(width)) for height, width in sizes):
        try:
            _without_contents(model, size) or model(_image(model, size))
            accepted.append(size)
        except Exception as error:  # the model's own
            words = (str(error).strip().splitlines() or [""])[0][:300]
            refusal = (
                f"{type(model).__name__} refuses an image of {size_text(size)}: "
                f"{type(error).__name__}: {words}"
            )
            if strict:
                raise OptionError(f"{refusal}. Choose another size") from error
    if not accepted:
        raise OptionError(f"{refusal}. Name a size that it takes")
    return accepted


def _without_contents(model: nn.Module, size: Size) -> bool:
    """Whether a pass at a size is known to work, which costs nothing to find out."""
    try:
        _counts(model, _image(model, size), {})
    except Exception:
        return False
    return True


def _scaled(size: Size, share: float) -> Size:
    height, width = (max(64, round(side * share / 32) * 32) for side in size)
    return height, width


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _image(model: nn.Module, size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, input_channels(model), *size, generator=generator)
    return image.to(next(model.parameters()))


def _measure(
    models: tuple[nn.Module, nn.Module], size: Size, asked: bool, report: CastleReport
) -> Measured:
    image = _image(models[0], size)
    passes = {name: partial(m, image) for name, m in zip("ab", models, strict=True)}
    peaks: list[int] = []
    start = time.perf_counter()
    for run in passes.values():
        try:
            with PeakMemory(image.device.type) as peak:
                run()
            peaks.append(peak.bytes)
        except UnavailableError:
            run()
    seconds = time.perf_counter() - start
    rounds = 2 if seconds >= LONG else repeats_within(SECONDS, seconds)
    medians = paired_medians(passes, rounds, warm=True)
    times = (medians["a"] * 1e3, medians["b"] * 1e3)
    found = Measured(size, asked, times, peak_bytes=_pair(peaks))
    if asked:
        _add_stages(found, models, image, report)
    return found


def _pair(values: Sequence[int]) -> tuple[int, int] | None:
    return (values[0], values[1]) if len(values) == 2 else None


def _add_stages(
    found: Measured,
    models: tuple[nn.Module, nn.Module],
    image: Tensor,
    report: CastleReport,
) -> None:
    names = [item.name for item in report.castled]
    attentions = [{name: m.get_submodule(name) for name in names} for m in models]
    shares = _shares_of_time(models[0], attentions[0], image)
    counts = []
    for one, parts in zip(models, attentions, strict=True):
        try:
            counts.append(_counts(one, image, parts))
        except Exception:  # what the model does depends on its input
            counts.append(_counts(one, image, parts, real=True))
    (before, _), (after, tokens) = counts
    found.macs = (sum(before.values()), sum(after.values()))
    for item in report.castled:
        stage = found.stages.setdefault(item.stage, Stage())
        stage.attentions += 1
        groups = tokens.get(item.name, [(1, 0)])
        stage.tokens = max(stage.tokens, max(count for _, count in groups))
        stage.windows = max(stage.windows, sum(batch for batch, _ in groups))
        for side, macs in enumerate((before, after)):
            stage.macs[side] += macs.get(item.name, 0)
        stage.share_of_macs += before.get(item.name, 0) / max(found.macs[0], 1)
        stage.share_of_time += shares.get(item.name, 0.0)


def _counts(
    model: nn.Module, image: Tensor, parts: dict[str, nn.Module], real: bool = False
) -> tuple[dict[str, int], Groups]:
    """MACs by part, and by :data:`SELF` what is left; and who attends to whom."""
    if real:
        with _groups_of(parts) as groups:
            return {SELF: 0, **count_macs(model, image, parts).by_module}, groups
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    # Without contents, any resolution is counted at once.
    copied = copy.deepcopy(model)
    inside = {name: copied.get_submodule(name) for name in parts}
    with FakeTensorMode(allow_non_fake_inputs=True), _groups_of(inside) as groups:
        fake = torch.empty(image.shape, device=image.device, dtype=image.dtype)
        return {SELF: 0, **count_macs(copied, fake, inside).by_module}, groups


def _shares_of_time(
    model: nn.Module, parts: dict[str, nn.Module], image: Tensor
) -> dict[str, float]:
    """The share of a pass that each of some modules takes."""
    running: dict[str, float] = {}
    since: dict[str, float] = {}

    def enter(name: str, *_: Any) -> None:
        synchronize()
        since[name] = time.perf_counter()

    def leave(name: str, *_: Any) -> None:
        synchronize()
        running[name] = running.get(name, 0.0) + time.perf_counter() - since[name]

    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            for register, function in (
                (part.register_forward_pre_hook, enter),
                (part.register_forward_hook, leave),
            ):
                stack.callback(register(partial(function, name)).remove)
        synchronize()
        start = time.perf_counter()
        model(image)
        synchronize()
        whole = time.perf_counter() - start
    return {name: value / whole for name, value in running.items()}


@contextlib.contextmanager
def _groups_of(parts: dict[str, nn.Module]) -> Iterator[Groups]:
    seen: Groups = {}

    def keep(name: str, _: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(name, []).append((args[0].shape[0], args[0].shape[2]))

    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            for mixer in part.modules():
                if isinstance(mixer, TokenMixer):
                    handle = mixer.register_forward_hook(partial(keep, name))
                    stack.callback(handle.remove)
        yield seen


def _crossing(measured: Sequence[Measured]) -> float | None:
    """Pixels beyond which castling is faster, between sizes on straight lines.

    Lines are those of logarithms, of pixels and of how many times as fast it is.
    """
    gains = [(m.pixels, math.log(m.times_as_fast)) for m in measured]
    if gains[-1][1] <= 0:
        return None
    for (pixels, gain), (more, next_gain) in reversed(list(pairwise(gains))):
        if gain <= 0:
            share = -gain / (next_gain - gain)
            return math.exp(math.log(pixels) * (1 - share) + math.log(more) * share)
    return 0.0
