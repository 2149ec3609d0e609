"""Predict pictures or a video and paint what was found: what ``tools/demo.py`` does."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TimeRemainingColumn,
)

from mmcastling.checkpoint import write_atomically
from mmcastling.errors import ConfigError
from mmcastling.run.config import check_work_dir
from mmcastling.run.predictors import Predictor
from mmcastling.runtime.preprocess import read_image
from mmcastling.show.painting import Painter

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")


@dataclass(frozen=True)
class DemoReport:
    """What a demo did.

    Attributes:
        seconds: For each picture or frame, from the picture in memory to the
            prediction.
        written: The painted files.
    """

    seconds: list[float]
    written: list[Path]

    def __str__(self) -> str:
        rest = self.seconds[1:] or self.seconds
        first = f", the first took {self.seconds[0]:.4f}" if self.seconds[1:] else ""
        name = "image" if len(self.seconds) == 1 else "images"
        return (
            f"{len(self.seconds)} {name}, {statistics.median(rest):.4f} s per image "
            f"(median, from the picture in memory to the prediction{first})"
        )


def find_sources(source: str | os.PathLike[str]) -> list[Path]:
    """The pictures that are meant, or the one video.

    A folder stands for its own pictures in the order of their names.

    Raises:
        ConfigError: If there is no picture or video, or a picture is none by its first
            bytes.
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
    for path in found:
        if not _is_video(path) and not cv2.haveImageReader(str(path)):
            raise ConfigError(
                f"picture {path} ({path.stat().st_size} bytes) cannot be read: it is "
                "damaged, or no picture of the kind that its name says; take it out, "
                "or copy it again"
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
    Detections with lower scores are not drawn.

    Raises:
        UserError: If a picture cannot be read, or the folder not be written.
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
        for path, target in progress.track(pairs, description="predicting"):
            png = cv2.imencode(".png", paint(read_image(path), path))[1].tobytes()
            write_atomically(target, lambda file, png=png: file.write(png))
    return DemoReport(seconds, targets)


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
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-") as folder:
        unfinished, writer = Path(folder) / target.name, cv2.VideoWriter()
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
