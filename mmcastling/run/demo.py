"""Predict and paint pictures or a video, by a checkpoint or an exported file."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.structures import BaseDataElement
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TimeRemainingColumn,
)

from mmcastling.analysis import input_channels
from mmcastling.checkpoint import load_checkpoint
from mmcastling.compat.model_index import find_config
from mmcastling.deploy import check_precision, is_deployed, set_precision
from mmcastling.errors import ConfigError, UserError
from mmcastling.files import temporary_folder, write_atomically
from mmcastling.run.config import (
    dataset_meta,
    datasets_of,
    load_config,
)
from mmcastling.run.load import load_pruned_model
from mmcastling.run.pipelines import FilePipeline
from mmcastling.run.testing import add_prediction
from mmcastling.run.work_dir import check_work_dir
from mmcastling.runtime import SUFFIXES, ExportedInferencer, is_exported
from mmcastling.runtime.images import PICTURES, read_image, with_channels
from mmcastling.show.painting import Painter

# -- what predicts --------------------------------------------------------------------

TOOLBOXES = {"detector": "mmdet", "classifier": "mmpretrain", "segmentor": "mmseg"}
"""Whose data samples and visualizer each kind of model has."""


@dataclass(frozen=True)
class Predictor:
    """What predicts: the deployed model, or an exported file's inferencer.

    Attributes:
        scope: The toolbox that draws what it predicts.
        dataset_meta: ``classes`` and ``palette``, where they are known.
        name: What predicts, in words.
        read: From the path of a picture to ``(H, W, C)`` in BGR, or ``(H, W)``, as its
            config reads it.
        predict: From such a picture to the toolbox's data sample, in the picture's
            pixels.
    """

    scope: str
    dataset_meta: dict[str, Any]
    name: str
    model: Any
    read: Callable[[str | os.PathLike[str]], np.ndarray]
    predict: Callable[[np.ndarray], BaseDataElement]

    def __call__(self, image: np.ndarray) -> tuple[BaseDataElement, float]:
        """The prediction for a picture, and the seconds that it took."""
        begin = time.perf_counter()
        sample = self.predict(image)
        return sample, time.perf_counter() - begin


def build_predictor(
    model: list[str], device: str | None = None, runtime: str | None = None
) -> Predictor:
    """Build what the command line names.

    Args:
        model: A config, or the name of one of ours, and its checkpoint; or an exported
            file alone.
        device: Defaults to None (a GPU where there is one; exported files run on the
            CPU).
        runtime: What runs an exported file. Defaults to None (its format's own).

    Raises:
        UserError: If these are not such files or cannot be read, an option does not go
            with them or with this machine, or what they predict cannot be drawn.
    """
    if len(model) == 1 and is_exported(model[0]):
        if device not in (None, "cpu"):
            raise ConfigError(
                f"--device {device}: exported files run on the CPU here; leave it out"
            )
        return _exported_predictor(model[0], runtime)
    if len(model) != 2 or is_exported(model[1]):
        raise ConfigError(_usage(model))
    if runtime not in (None, "torch"):
        raise ConfigError(
            f"--runtime {runtime} runs exported files, and {model[1]} is a checkpoint: "
            "export it with tools/export.py first, or leave the option out"
        )
    config = model[0]
    if Path(config).suffix != ".py" and not Path(config).exists():
        config = find_config(config)
    return _torch_predictor(load_config(config), model[1], _device(device))


def _usage(model: list[str]) -> str:
    given = " ".join(model)
    path = Path(model[0])
    if len(model) == 1 and path.suffix in (".pth", ".pt"):
        beside = path.with_suffix(".py")
        known = f", {beside} perhaps" if beside.is_file() else ""
        return f"checkpoint {given} needs its config in front of it{known}"
    if len(model) == 1:
        return f"config {given} needs a checkpoint after it"
    return (
        f"expected CONFIG CHECKPOINT, or one exported file ({', '.join(SUFFIXES)}), "
        f"got {given}"
    )


def _torch_predictor(
    cfg: Config, path: str | os.PathLike[str], device: torch.device
) -> Predictor:
    precision = cfg.get("precision", "fp32")
    check_precision(precision, device)
    scope = cfg.get("default_scope", "mmengine")
    if scope not in TOOLBOXES.values():
        raise ConfigError(
            f"config {cfg.filename} is of {scope!r}; pictures are drawn for "
            f"{', '.join(TOOLBOXES.values())}"
        )
    checkpoint = load_checkpoint(path)
    pipeline = FilePipeline(cfg)
    model, _ = load_pruned_model(cfg, checkpoint, path, verify=False)
    model.to(device)
    set_precision(model, precision)
    channels = input_channels(model)

    @torch.inference_mode()
    def predict(image: np.ndarray) -> BaseDataElement:
        image = with_channels(image, channels)  # of a video
        (sample,) = model.test_step(pseudo_collate([pipeline(image)]))
        return sample.cpu()  # waits for a GPU

    meta = dataset_meta(next(datasets_of(cfg, "test")), checkpoint)
    pruned = "" if is_deployed(checkpoint) else ", pruned"
    name = f"torch in {precision} on {device}{pruned}"
    return Predictor(scope, meta, name, model, pipeline.read, predict)


def _exported_predictor(path: str, runtime: str | None) -> Predictor:
    inferencer = ExportedInferencer(path, runtime)
    metadata = inferencer.metadata
    if metadata.kind not in TOOLBOXES:
        raise ConfigError(
            f"{path} holds a {metadata.kind}, which predicts nothing that could be "
            "drawn: export the whole model"
        )

    def predict(image: np.ndarray) -> BaseDataElement:
        sample = BaseDataElement()
        add_prediction(sample, inferencer.predict(image))
        return sample

    meta = dict(classes=metadata.classes or None, palette=metadata.palette or None)
    name = f"{inferencer.model.runtime} in {metadata.precision}"
    read = functools.partial(read_image, metadata=metadata)
    return Predictor(TOOLBOXES[metadata.kind], meta, name, inferencer, read, predict)


def _device(name: str | None) -> torch.device:
    name = name or get_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {name} cannot be used here: {reason}; try --device cpu"
        ) from error
    return device


# -- pictures and videos ---------------------------------------------------------------

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class DemoReport:
    """The painted files, and the seconds that each picture or frame took.

    They run from the picture in memory to the prediction. What could not be read is
    ``damaged``, in words.
    """

    seconds: list[float]
    written: list[Path]
    damaged: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.seconds:
            return "0 images"
        first, *rest = self.seconds
        text = f", the first took {first:.4f}" if rest else ""
        return (
            f"{len(self.seconds)} {'images' if rest else 'image'}, "
            f"{statistics.median(rest or [first]):.4f} s per image (median, from the "
            f"picture in memory to the prediction{text})"
        )


def find_sources(source: str | os.PathLike[str]) -> list[Path]:
    """The pictures that are meant, or the one video.

    A folder stands for its own pictures in the order of their names. Anything else is a
    :class:`ConfigError`, as is one picture that is none by its first bytes.
    """
    source = Path(source)
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.suffix.lower() in PICTURES)
        if not found:
            raise ConfigError(
                f"folder {source} holds no picture: expected files that end in one of "
                f"{', '.join(PICTURES)}"
            )
    elif not source.exists():
        raise ConfigError(f"{source} does not exist: check the path")
    elif source.suffix.lower() in (*PICTURES, *VIDEOS):
        found = [source]
    else:
        raise ConfigError(
            f"{source} is neither a picture ({', '.join(PICTURES)}), nor a video "
            f"({', '.join(VIDEOS)}), nor a folder of pictures"
        )
    is_single = found == [source] and not _is_video(source)
    if is_single and not cv2.haveImageReader(str(source)):
        raise ConfigError(
            f"picture {source} ({source.stat().st_size} bytes) cannot be read: it is "
            "damaged, or no picture of the kind that its name says; copy it again"
        )
    return found


def run_demo(
    source: str | os.PathLike[str],
    predictor: Predictor,
    out_dir: str | os.PathLike[str],
    score_thr: float = 0.3,
    console: Console | None = None,
) -> DemoReport:
    """Predict, paint and write, with a line for each picture and a bar of progress.

    Pictures are written into the folder as PNG under their own names, a video as MP4.
    Detections with lower scores are not drawn. A picture that cannot be read is passed
    over, and named in the report.
    """
    sources = find_sources(source)
    targets = _targets(sources, Path(out_dir))
    check_work_dir(out_dir)
    console = console or Console()
    painter = Painter(predictor.scope, predictor.dataset_meta, score_thr)
    seconds: list[float] = []

    def paint(image: np.ndarray, path: Path | None = None) -> np.ndarray:
        sample, taken = predictor(image)
        seconds.append(taken)
        if path is not None:
            text = f"{path.name}: {painter.shown(sample)}, {taken:.4f} s"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        return painter(image, sample)

    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn()]
    with Progress(
        SpinnerColumn(), *columns, TimeRemainingColumn(), console=console
    ) as progress:
        if _is_video(sources[0]):
            _paint_video(sources[0], targets[0], paint, progress)
            return DemoReport(seconds, targets)
        pairs = list(zip(sources, targets, strict=True))
        written, damaged = [], []
        for path, target in progress.track(pairs, description="predicting"):
            try:
                image = predictor.read(path)
            except UserError as error:
                damaged.append(str(error))
                continue
            png = cv2.imencode(".png", paint(image, path))[1].tobytes()
            write_atomically(target, lambda file, png=png: file.write(png))
            written.append(target)
    return DemoReport(seconds, written, damaged)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _targets(sources: list[Path], out_dir: Path) -> list[Path]:
    stems = [path.stem for path in sources]
    targets = []
    for path in sources:
        ending = ".mp4" if _is_video(path) else ".png"
        # a.jpg and a.png would else be painted into the same file.
        name = path.stem if stems.count(path.stem) == 1 else path.name
        target = out_dir / f"{name}{ending}"
        if target.resolve() == path.resolve():
            raise ConfigError(
                f"--out-dir {out_dir}: {path} would be painted over; choose another "
                "folder"
            )
        targets.append(target)
    return targets


def _paint_video(
    path: Path,
    target: Path,
    paint: Callable[[np.ndarray], np.ndarray],
    progress: Progress,
) -> None:
    video = mmcv.VideoReader(str(path))
    if not video.opened:
        raise ConfigError(
            f"video {path} ({path.stat().st_size} bytes) cannot be read by OpenCV: "
            "it is damaged, or of a codec that it lacks; convert it to MP4 (H.264)"
        )
    count, rate = video.frame_cnt or None, video.fps or 25.0
    with temporary_folder(target) as folder:
        unfinished, writer = folder / target.name, cv2.VideoWriter()
        for frame in progress.track(video, total=count, description="predicting"):
            painted = paint(frame)
            height, width = painted.shape[:2]
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            if not writer.isOpened() and not writer.open(
                str(unfinished), codec, rate, (width, height)
            ):
                raise ConfigError(
                    f"OpenCV cannot write a video of {width}x{height} as MP4 here: "
                    "split the video into pictures, and give their folder"
                )
            writer.write(painted)
        if not writer.isOpened():
            raise ConfigError(f"video {path} has no frame that could be read")
        writer.release()
        unfinished.replace(target)
