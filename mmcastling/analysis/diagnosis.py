"""What the doctor found: figures, a verdict, and both as text and as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from mmcastling.castle import CastleReport

Size = tuple[int, int]

PAYS = 1.1
"""Times as fast that is worth a training."""
BUSY = 0.9
"""Load of each core beyond which times say little; starting up makes half of one."""


@dataclass
class Stage:
    """The castled attentions of one stage, at one size.

    Attributes:
        attentions: How many there are.
        tokens: How many each of them attends over, at most.
        windows: In how many groups the tokens of an image attend, apart.
        macs: MACs of the attentions, with their projections, before and after.
        share_of_macs: Of the whole pass, before.
        share_of_time: The same of its seconds, as they were measured.
    """

    attentions: int = 0
    tokens: int = 0
    windows: int = 0
    macs: list[int] = field(default_factory=lambda: [0, 0])
    share_of_macs: float = 0.0
    share_of_time: float = 0.0


@dataclass
class Measured:
    """One size of image: before castling and after, deployed.

    Attributes:
        size: ``(H, W)``.
        asked: Whether it was asked for, or is there for the curve.
        milliseconds: Median of passes of one image.
        macs: Of one pass; zeros for what was not asked for.
        peak_bytes: Most memory beyond the weights, or None where the system does not
            tell.
        stages: The attentions, by stage.
    """

    size: Size
    asked: bool
    milliseconds: tuple[float, float]
    macs: tuple[int, int] = (0, 0)
    peak_bytes: tuple[int, int] | None = None
    stages: dict[int, Stage] = field(default_factory=dict)

    @property
    def times_as_fast(self) -> float:
        """How many times as fast castling makes the model."""
        return self.milliseconds[0] / self.milliseconds[1]

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


@dataclass
class Diagnosis:
    """What :func:`doctor` found.

    Attributes:
        model: Its class.
        machine: Versions, processor and threads, and the load before measuring.
        report: What castling does to the model.
        measured: All sizes, the smallest first.
        crossing: Pixels of an image from which castling is faster, 0 if it is at all
            sizes measured, None if at none.
    """

    model: str
    machine: dict[str, Any]
    report: CastleReport
    measured: list[Measured]
    crossing: float | None

    @property
    def largest(self) -> Measured:
        """The largest size that was asked for."""
        return max((m for m in self.measured if m.asked), key=lambda m: m.pixels)

    @property
    def pays(self) -> bool:
        """Whether castling makes the largest size asked for notably faster."""
        return self.largest.times_as_fast >= PAYS

    @property
    def crossing_size(self) -> Size | None:
        """The crossing as ``(H, W)`` in the shape of the largest size."""
        if not self.crossing:
            return None
        height, width = self.largest.size
        side = math.sqrt(self.crossing / (height * width))
        return round(height * side), round(width * side)

    @property
    def machine_line(self) -> str:
        """Where it was measured."""
        machine = self.machine
        return (
            f"{machine['device']}, {machine['threads']} threads, torch "
            f"{machine['torch']}, load {machine.get('load', 'unknown')}"
        )

    @property
    def busy(self) -> str:
        """A warning where other work ran before measuring, else nothing."""
        load, cores = self.machine.get("load", 0.0), os.cpu_count() or 1
        if load < BUSY * cores:
            return ""
        return (
            f"the machine was busy (load {load} on {cores} cores): these times say "
            "little. Measure again when nothing else runs"
        )

    @property
    def verdict(self) -> str:
        """One sentence."""
        largest, where = self.largest, size_text(self.largest.size)
        before, after = largest.milliseconds
        times = largest.times_as_fast
        took = f"{before:,.0f} ms become {after:,.0f}"
        attended = max(stage.tokens for stage in largest.stages.values())
        share = sum(stage.share_of_time for stage in largest.stages.values())
        why = f"its attentions take {share:.0%} of the time there"
        if any(stage.windows > 1 for stage in largest.stages.values()):
            why += f", and attend over at most {attended:,} tokens at once"
        since = (
            f"; it is faster from about {size_text(self.crossing_size or (0, 0))} on"
        )
        if not self.crossing:
            since = "; it is faster at every size measured"
            if self.crossing is None:
                since = f"; it is faster at no size up to {where}"
        if not self.pays:
            how = f"{times:.2f} times as fast" if times >= 1 else "slower"
            return (
                f"do not castle this: at {where} it would be {how} ({took}), as {why}"
                f"{since}"
            )
        lost = ", but what is dropped is lost" if self.report.lossy else ""
        return (
            f"castle this: at {where} it is {times:.1f} times as fast ({took}){since}"
            f"{lost}"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        facts = asdict(self)
        facts["report"] = str(self.report).splitlines()
        for one, measured in zip(facts["measured"], self.measured, strict=True):
            one["times_as_fast"] = measured.times_as_fast
        return dict(
            facts,
            crossing_size=self.crossing_size,
            pays=self.pays,
            busy=self.busy,
            verdict=self.verdict,
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def size_text(size: Size) -> str:
    """``HxW``."""
    return f"{size[0]}x{size[1]}"


def _lines(found: Diagnosis) -> Iterator[str]:
    yield f"{found.model} on {found.machine_line}"
    if found.busy:
        yield f"warning: {found.busy}"
    yield ""
    heads = ("size", "ms before", "after", "faster", "peak MB", "after", "GMACs")
    row = "{:>10} {:>10} {:>8} {:>7} {:>8} {:>7} {:>8} {:>7}"
    yield row.format(*heads, "after")
    for one in found.measured:
        memory = ["-", "-"]
        if one.peak_bytes is not None:
            memory = [f"{value / 1e6:,.0f}" for value in one.peak_bytes]
        macs = [f"{value / 1e9:.1f}" if value else "" for value in one.macs]
        times = [f"{value:,.1f}" for value in one.milliseconds]
        faster = f"{one.times_as_fast:.2f}x"
        yield row.format(size_text(one.size), *times, faster, *memory, *macs)
    for one in filter(lambda one: one.asked, found.measured):
        yield ""
        yield f"attention at {size_text(one.size)}, projections included, before:"
        row = "{:>7} {:>10} {:>10} {:>8} {:>13} {:>13}"
        names = ("stage", "attentions", "tokens", "windows")
        yield row.format(*names, "share of MACs", "share of time")
        total = Stage()
        for index, stage in one.stages.items():
            shares = (stage.share_of_macs, stage.share_of_time)
            counts = (stage.attentions, f"{stage.tokens:,}", f"{stage.windows:,}")
            yield row.format(index, *counts, *(f"{share:.1%}" for share in shares))
            total.attentions += stage.attentions
            total.share_of_macs += stage.share_of_macs
            total.share_of_time += stage.share_of_time
        shares = (total.share_of_macs, total.share_of_time)
        yield row.format(
            "all", total.attentions, "", "", *(f"{share:.1%}" for share in shares)
        )
    yield ""
    yield "castling:"
    yield from (f"  {line}" for line in str(found.report).splitlines())
    yield ""
    yield f"verdict: {found.verdict}"
