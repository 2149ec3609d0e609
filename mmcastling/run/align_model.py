"""Castle a trained model and align it with itself: what ``tools/align.py`` does."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmcastling.alignment import (
    PictureBatches,
    align,
    attention_errors,
    attention_pairs,
    feature_similarity,
    scan,
)
from mmcastling.alignment.aligning import STATE_FILE
from mmcastling.alignment.scanning import ScanRow, check_budget, choose_kept
from mmcastling.analysis import paired_medians
from mmcastling.analysis.examination import accepted_sizes
from mmcastling.castle import castle, recommended_options
from mmcastling.checkpoint import (
    load_checkpoint,
    save_atomically,
    write_json_atomically,
    write_text_atomically,
)
from mmcastling.errors import CheckpointError, ConfigError
from mmcastling.export.graphs import input_of
from mmcastling.named_models import CASTLE_META_KEY, build_named_model
from mmcastling.verbs import castling_modules, set_mask, switch_to_deploy

if TYPE_CHECKING:
    from mmengine.config import Config

logger = logging.getLogger("mmcastling")

ALIGNED, CONFIG, REPORT = "aligned.pth", "aligned.py", "report.json"
SETTINGS = "settings.json"
_HELD_OUT = 0.1  # of the pictures: what errors are measured on
_MEASURED = 2  # batches of each size


@dataclass
class AlignmentReport:
    """What an alignment has brought, on pictures that it was not trained on.

    Attributes:
        kept: Attentions that stay softmax.
        errors_before, errors_after: Relative squared error of each castled attention.
        cosines_before, cosines_after: Of the features, by image size, one for each
            tensor that the next part reads.
        milliseconds: Median of an image by size: softmax, and castled and deployed.
    """

    kept: list[str]
    errors_before: dict[str, float]
    errors_after: dict[str, float]
    cosines_before: dict[str, list[float]]
    cosines_after: dict[str, list[float]]
    milliseconds: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        width = max(map(len, self.errors_after))
        lines = [f"{'attention':<{width}}  error before   after"]
        lines += [
            f"{name:<{width}}  {before:12.3f}  {self.errors_after[name]:6.3f}"
            for name, before in self.errors_before.items()
        ]
        lines += [f"{name:<{width}}  kept as softmax" for name in self.kept]
        for size, after in self.cosines_after.items():
            softmax, castled = self.milliseconds[size]
            shown = (
                ", ".join(f"{value:.3f}" for value in values)
                for values in (self.cosines_before[size], after)
            )
            line = "{}: cosine of the features {} -> {}; {:.1f} -> {:.1f} ms an image"
            lines.append(line.format(size, *shown, softmax, castled))
            if castled > softmax:
                lines[-1] += " (slower: tools/doctor.py says from where on it pays)"
        return "\n".join(lines)


def trained_model(
    model: str | Config, checkpoint: str | None
) -> tuple[nn.Module, nn.Module]:
    """A trained softmax model, and the part of it that is castled and aligned.

    Args:
        model: A config, or a name as :func:`build_named_model` takes it.
        checkpoint: Its weights; may be None for a folder of transformers.

    Raises:
        UserError: If it cannot be built, or the checkpoint does not fit.
    """
    if isinstance(model, str):
        whole = build_named_model(model, checkpoint)
        return whole, whole
    if checkpoint is None:
        raise ConfigError("a config's model needs its checkpoint")
    from mmcastling.run.load import load_model

    whole = load_model(model, load_checkpoint(checkpoint), checkpoint)
    return whole, getattr(whole, "backbone", whole)


def align_model(
    model: str | Config,
    checkpoint: str | None,
    pictures: str | Path,
    out: str | Path,
    *,
    sizes: Sequence[tuple[int, int]] = ((224, 224),),
    steps: tuple[int, int] = (300, 0),
    learning_rates: tuple[float, float] = (3e-4, 4e-5),
    batch_size: int = 4,
    attention: dict[str, Any] | None = None,
    keep: Sequence[int | str] | str = (),
    budget: int | float = 2,
    seed: int = 0,
    amp: bool | None = None,
) -> AlignmentReport:
    """Castle a trained model, align it, and write it with a report and a picture.

    Called again with the same arguments it goes on where it was interrupted.

    Args:
        model: A config, or a name as :func:`build_named_model` takes it. A config's
            backbone is castled and aligned, and its heads stay as they are.
        checkpoint: Its weights.
        pictures: Folder of pictures without labels; a tenth is held out to measure on.
        out: Folder to write: ``aligned.pth``, with ``aligned.py`` for a config, which
            ``tools/train.py``, ``test.py`` and ``convert.py`` take; ``report.json`` and
            ``errors.png``.
        sizes: ``(H, W)`` that steps have in turn. Defaults to 224x224.
        steps: See :func:`mmcastling.align`; so are ``learning_rates`` and ``amp``.
        batch_size: Pictures of a step. Defaults to 4.
        attention: Options of the attention, as of :func:`mmcastling.castle`.
        keep: See :func:`mmcastling.castle`; ``'auto'`` scans pictures trained on.
        budget: See there.
        seed: Of everything random. Defaults to 0.

    Raises:
        UserError: If an argument cannot be used, or the networks cannot be aligned.
    """
    from mmcastling.show.align_figures import plot_errors

    out = Path(out)
    whole, teacher = trained_model(model, checkpoint)
    with torch.no_grad():
        accepted_sizes(teacher, sizes)
    options = recommended_options(attention or {})
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give the name of a folder")
    batches, held_out = _pictures(whole, pictures, sizes, batch_size, seed)
    given = dict(
        model=model if isinstance(model, str) else str(model.filename),
        checkpoint=checkpoint,
        pictures=batches.described,
        steps=list(steps),
        learning_rates=list(learning_rates),
        attention=options,
        keep=keep if isinstance(keep, str) else list(keep),
        budget=budget,
        seed=seed,
        amp=amp,
    )
    stored = _stored(out, given)
    if (out / REPORT).is_file() and (out / ALIGNED).is_file() and stored:
        logger.info("%s is finished: this is its report", out)
        return AlignmentReport(**json.loads((out / REPORT).read_text()))
    kept = stored.get("kept")
    if kept is None:
        kept = list(keep)
        if keep == "auto":
            kept = _chosen(teacher, batches, sizes[0], budget, options)
    torch.manual_seed(seed)
    student, said = castle(
        copy.deepcopy(teacher), keep=kept, return_report=True, **options
    )
    kept = [name for name, reason in said.left_alone.items() if reason == "kept"]
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out / SETTINGS, dict(given, kept=kept))
    logger.info("measuring on %d pictures that are held out", len(held_out.paths))
    before = _measure(student, teacher, held_out, sizes)
    align(
        student,
        teacher,
        batches,
        steps=steps,
        learning_rates=learning_rates,
        folder=out,
        amp=amp,
    )
    after = _measure(student, teacher, held_out, sizes)
    milliseconds = _milliseconds(student, teacher, held_out, sizes)
    report = AlignmentReport(
        kept, before[0], after[0], before[1], after[1], milliseconds
    )
    _write(model, whole, teacher, student, {**options, "keep": kept}, out)
    write_json_atomically(out / REPORT, asdict(report))
    plot_errors(report.errors_before, report.errors_after, out / "errors.png")
    (out / STATE_FILE).unlink(missing_ok=True)  # three times the weights
    return report


def _stored(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call for a folder has noted; nothing in a new one."""
    path = out / SETTINGS
    begun = any((out / name).exists() for name in (ALIGNED, STATE_FILE))
    if begun and not path.is_file():
        raise ConfigError(f"{out} is of something else: take another folder")
    if not begun:  # at most settings, of a call that was refused or soon interrupted
        return {}
    stored = json.loads(path.read_text())
    given = json.loads(json.dumps(given, default=str))
    for name, value in given.items():
        if stored.get(name) != value:
            raise ConfigError(
                f"{out} is of an alignment with {name} {stored.get(name)}, not "
                f"{value}: give the same to go on, or take another folder"
            )
    return stored


def _chosen(
    teacher: nn.Module,
    batches: PictureBatches,
    size: tuple[int, int],
    budget: int | float,
    options: dict[str, Any],
) -> list[str]:
    """What a scan of pictures says should stay softmax; the scan is logged."""
    student = castle(copy.deepcopy(teacher), **options)
    check_budget(budget, len(attention_pairs(student, teacher)))
    images = [batches.batch(step, size) for step in range(_MEASURED)]
    rows = scan(student, teacher, images)
    kept = choose_kept(rows, budget)
    logger.info("%s\nkept softmax: %s", scan_table(rows), ", ".join(kept))
    if 2 * len(kept) > len(rows):
        logger.warning(
            "%d of %d attentions stay softmax, as castling them saves next to nothing "
            "at %dx%d: ask tools/doctor.py whether it pays",
            *(len(kept), len(rows), *size),
        )
    return kept


def scan_table(rows: Sequence[ScanRow]) -> str:
    """A scan as a table."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'castled alone':<{width}}  damage  softmax ms  castled ms"]
    lines += [
        f"{row.name:<{width}}  {row.damage:6.3f}  {row.softmax_ms:10.1f}  "
        f"{row.castled_ms:10.1f}"
        for row in rows
    ]
    return "\n".join(lines)


def scan_model(
    model: str | Config,
    checkpoint: str | None,
    pictures: str | Path,
    *,
    size: tuple[int, int] = (224, 224),
    batch_size: int = 4,
    attention: dict[str, Any] | None = None,
    aligned: str | None = None,
    seed: int = 0,
) -> list[ScanRow]:
    """Castle each attention of a trained model alone: what ``tools/scan.py`` does.

    Arguments as of :func:`align_model`; ``aligned`` is a checkpoint that this has
    written, whose attentions are looked at instead of untrained ones.
    """
    whole, teacher = trained_model(model, checkpoint)
    batches, _ = _pictures(whole, pictures, [size], batch_size, seed)
    torch.manual_seed(seed)
    options = recommended_options(attention or {})
    if aligned is None:
        student = castle(copy.deepcopy(teacher), **options)
    else:
        state = load_checkpoint(aligned)
        if CASTLE_META_KEY not in (state.get("meta") or {}):
            raise CheckpointError(
                f"{aligned} does not say how its model was castled: give what "
                "tools/align.py has written"
            )
        student = castle(copy.deepcopy(teacher), **state["meta"][CASTLE_META_KEY])
        prefix = "" if whole is teacher else "backbone."
        student.load_state_dict(
            {
                name.removeprefix(prefix): value
                for name, value in state["state_dict"].items()
                if name.startswith(prefix)
            }
        )
    return scan(student, teacher, [batches(step) for step in range(_MEASURED)])


def _pictures(
    whole: nn.Module,
    folder: str | Path,
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    seed: int,
) -> tuple[PictureBatches, PictureBatches]:
    """Pictures to train on and to measure on, normalised as the model wants them."""
    options: dict[str, Any] = dict(sizes=sizes, batch_size=batch_size, seed=seed)
    preprocessor = getattr(whole, "data_preprocessor", None)
    published = getattr(whole, "pretrained_cfg", None)
    if preprocessor is not None:
        read = input_of(preprocessor)
        options.update({name: read[name] for name in ("mean", "std") if name in read})
        options["bgr"] = not read["to_rgb"]
    elif isinstance(published, dict) and "mean" in published:  # timm's, from 0 to 1
        options.update({n: [255 * x for x in published[n]] for n in ("mean", "std")})
    return PictureBatches(folder, **options).split(_HELD_OUT)


def _measure(
    student: nn.Module,
    teacher: nn.Module,
    held_out: PictureBatches,
    sizes: Sequence[tuple[int, int]],
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Errors of attentions and cosines of features, as deployed."""
    student = copy.deepcopy(student)
    student.train(False)
    if any(True for _ in castling_modules(student)):
        set_mask(student, 1.0)
    batches = [[held_out.batch(i, size) for i in range(_MEASURED)] for size in sizes]
    return attention_errors(student, teacher, batches[0]), {
        f"{height}x{width}": feature_similarity(student, teacher, part)
        for (height, width), part in zip(sizes, batches, strict=True)
    }


@torch.no_grad()
def _milliseconds(
    student: nn.Module,
    teacher: nn.Module,
    held_out: PictureBatches,
    sizes: Sequence[tuple[int, int]],
) -> dict[str, tuple[float, float]]:
    deployed, found = switch_to_deploy(student), {}
    for height, width in sizes:
        x = held_out.batch(0, (height, width))[:1]
        passes = {"softmax": lambda x=x: teacher(x), "castled": lambda x=x: deployed(x)}
        seconds = paired_medians(passes, repeats=5)
        found[f"{height}x{width}"] = tuple(1000 * s for s in seconds.values())
    return found


def _write(
    model: str | Config,
    whole: nn.Module,
    teacher: nn.Module,
    student: nn.Module,
    options: dict[str, Any],
    out: Path,
) -> None:
    """Write the checkpoint, and for a config the config that builds its model."""
    meta: dict[str, Any] = {CASTLE_META_KEY: options}
    result = student
    if not isinstance(model, str):
        if value := getattr(whole, "dataset_meta", None):
            meta["dataset_meta"] = value
        if whole is not teacher:
            whole.backbone = result = student
            result = whole
        cfg = copy.deepcopy(model)
        spec = cfg.model.backbone if whole is not teacher else cfg.model
        options = dict(options)
        castled = dict(type="mmcastling.Castled", backbone=copy.deepcopy(spec))
        castled.update(keep=options.pop("keep"), attention=options)
        if whole is teacher:
            cfg.model = castled
        else:
            cfg.model.backbone = castled
        cfg.load_from = str(out / ALIGNED)
        write_text_atomically(out / CONFIG, cfg.pretty_text)
    save_atomically(dict(state_dict=result.state_dict(), meta=meta), out / ALIGNED)
