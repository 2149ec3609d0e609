"""What a training run logged about its masks and its metrics, from its work directory.

MMEngine writes ``<timestamp>/vis_data/scalars.json``, a record a line, with a timestamp
of its own for each time that training was started or resumed.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcastling.errors import OptionError

GROUPS = ("early", "middle", "late")

# The metric that a toolbox's evaluator is usually judged by, drawn where nothing else
# is asked for.
HEADLINES = (
    *("coco/bbox_mAP", "coco/segm_mAP", "pascal_voc/mAP", "accuracy/top1", "mIoU"),
)
# What validation records hold beside metrics.
_NOT_METRICS = {"step", "iter", "epoch", "time", "data_time", "memory"}

_FRESH = re.compile(r"^resume\s*=\s*(False|None)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class MaskHistory:
    """What MaskDecayHook and the evaluators logged over a run.

    Attributes:
        steps: Iterations, one per record of the masks.
        density: Fraction of pairs that survived the mask, averaged over layers.
        groups: The same for the early, middle and late layers.
        threshold: The part of the threshold that is independent of the tokens ``N``.
        threshold_uniform: The part in units of uniform attention ``1/N``.
        weight: The branch's factor.
        metrics: ``(iteration, value)`` of every validation, by the metric's name.
    """

    steps: list[int]
    density: list[float]
    threshold: list[float]
    weight: list[float]
    threshold_uniform: list[float]
    groups: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def headlines(self) -> list[str]:
        """The metrics to show where none is named: the usual ones, or the first."""
        usual = [name for name in HEADLINES if name in self.metrics]
        return usual or list(self.metrics)[:1]


def read_mask_history(work_dir: str | Path) -> MaskHistory:
    """Read the records of masks and metrics from a work directory of any toolbox.

    A run that was resumed is read as one: what an earlier part recorded beyond the
    point of resuming is left out. Parts before the newest start from scratch do not
    belong to it. MMEngine numbers validations by epoch in most configs; those are
    placed at the training record before them, which is at most one logging interval
    too early. One of its folders named by timestamp can be read alone.
    A directory without a log of ``MaskDecayHook`` is a ``ValueError``.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise OptionError(f"work directory {work_dir} does not exist: check the path")
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    files += work_dir.glob("vis_data/scalars.json")
    if not files:
        raise OptionError(
            f"{work_dir} holds no log of a training run (TIMESTAMP/vis_data/"
            "scalars.json): give the --work-dir of tools/train.py; a config without "
            "LocalVisBackend in its visualizer writes none"
        )
    train: list[dict[str, Any]] = []
    metrics: dict[str, dict[int, float]] = {}
    for file in files:
        _append_part(file, train, metrics)
    masks = [record for record in train if "mask_density" in record]
    if not masks:
        raise OptionError(
            f"{work_dir} holds no record of mask density: it was trained without "
            "MaskDecayHook, or ended before its first record. Put "
            "dict(type='MaskDecayHook') into custom_hooks and train again"
        )

    def column(name: str, default: float = math.nan) -> list[float]:
        return [record.get(name, default) for record in masks]

    groups = {name: column(f"mask_density_{name}") for name in GROUPS}
    return MaskHistory(
        steps=[record["step"] for record in masks],
        density=column("mask_density"),
        threshold=column("mask_threshold"),
        threshold_uniform=column("mask_threshold_uniform", 0.0),
        weight=column("mask_weight"),
        groups={k: v for k, v in groups.items() if not all(map(math.isnan, v))},
        metrics={k: sorted(v.items()) for k, v in metrics.items() if v},
    )


def _append_part(
    file: Path, train: list[dict[str, Any]], metrics: dict[str, dict[int, float]]
) -> None:
    """Add what one start of training logged, in place of what it repeated."""
    records = _read_lines(file)
    first = next((record["step"] for record in records if "iter" in record), None)
    if first is None:
        return
    config = file.parent / "config.py"  # says whether it was started from scratch
    fresh = config.is_file() and _FRESH.search(config.read_text(errors="replace"))
    start = 0 if fresh else first
    train[:] = [record for record in train if record["step"] < start]
    for values in metrics.values():
        for step in [step for step in values if step >= start]:
            del values[step]
    last = train[-1]["step"] if train else 0
    for record in records:
        if "iter" in record:
            train.append(record)
            last = record["step"]
            continue
        for name, value in record.items():
            if name not in _NOT_METRICS and isinstance(value, int | float):
                # An epoch's number, or 0, is below the iteration.
                step = max(last, record["step"])
                metrics.setdefault(name, {})[step] = float(value)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines, records = file.read_text(errors="replace").splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # a killed run leaves half a line
                break
            raise OptionError(
                f"{file}, line {number} is not a record of MMEngine's log: "
                f"{line[:60]!r}. Remove the line, or the folder of that start"
            ) from error
        # Some configs log with the phase in front of each name.
        records.append({re.sub("^(train|val)/", "", k): v for k, v in record.items()})
    return records
