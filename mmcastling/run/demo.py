"""Predict pictures or a video and paint what was found: what ``tools/demo.py`` does."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
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

    Args:
        source: A picture, a video, or a folder, whose own pictures are taken in the
            order of their names.

    Raises:
        ConfigError: If it does not exist, is of another kind, holds no picture, or a
            picture is none by its first bytes.
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
            raise ConfigError(_unreadable(path))
    return found


def run_demo(
    source: str | os.PathLike[str],
    predictor: Predictor,
    out_dir: str | os.PathLike[str],
    score_thr: float = 0.3,
    console: Console | None = None,
) -> DemoReport:
    """Predict, paint and write, with a line for each picture and a bar of progress.

    Args:
        source: See :func:`find_sources`.
        predictor: What predicts, see
            :func:`mmcastling.run.predictors.build_predictor`.
        out_dir: Folder for the painted files, made if need be. Pictures are written as
            PNG under their own names, a video as MP4.
        score_thr: Detections with lower scores are not drawn. Defaults to 0.3.
        console: Where to say it. Defaults to None (standard output).

    Raises:
        ConfigError: If the source cannot be read, or the folder not be written.
        CheckpointError: If a picture cannot be written.
    """
    sources = find_sources(source)
    targets = _targets(sources, Path(out_dir))
    check_work_dir(out_dir)
    console = console or Console()
    painter = Painter(predictor.scope, predictor.dataset_meta, score_thr)
    if _is_video(sources[0]):
        seconds = _video(sources[0], targets[0], predictor, painter, console)
        return DemoReport(seconds, targets)
    seconds = []
    with _progress(console) as progress:
        pairs = list(zip(sources, targets, strict=True))
        for path, target in progress.track(pairs, description="predicting"):
            image = _read(path)
            sample, taken = predictor(image)
            _write(target, painter(image, sample))
            seconds.append(taken)
            console.print(
                f"{path.name}: {painter.shown(sample)}, {taken:.4f} s",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
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


def _unreadable(path: Path) -> str:
    return (
        f"picture {path} ({path.stat().st_size} bytes) cannot be read: it is damaged, "
        "or no picture of the kind that its name says; take it out, or copy it again"
    )


def _read(path: Path) -> np.ndarray:
    image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ConfigError(_unreadable(path))
    return image


def _write(path: Path, image: np.ndarray) -> None:
    data = cv2.imencode(".png", image)[1]
    write_atomically(path, lambda file: file.write(data.tobytes()))


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _video(
    path: Path, target: Path, predictor: Predictor, painter: Painter, console: Console
) -> list[float]:
    seconds: list[float] = []
    with contextlib.ExitStack() as stack:
        capture = cv2.VideoCapture(str(path))
        stack.callback(capture.release)
        if not capture.isOpened():
            raise ConfigError(
                f"video {path} ({path.stat().st_size} bytes) cannot be read by OpenCV: "
                "it is damaged, or of a codec that it lacks; convert it to MP4 (H.264)"
            )
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) or None
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".demo-")
        unfinished = Path(stack.enter_context(folder)) / target.name
        progress = stack.enter_context(_progress(console))
        writer = None
        for frame in progress.track(
            _frames(capture), total=count, description="predicting"
        ):
            sample, taken = predictor(frame)
            painted = painter(frame, sample)
            if writer is None:
                writer = _writer(unfinished, painted.shape[:2], rate)
                stack.callback(writer.release)
            writer.write(painted)
            seconds.append(taken)
        if writer is None:
            raise ConfigError(f"video {path} has no frame that could be read")
        writer.release()
        unfinished.replace(target)
    return seconds


def _frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        read, frame = capture.read()
        if not read:
            return
        yield frame


def _writer(path: Path, shape: tuple[int, int], rate: float) -> cv2.VideoWriter:
    height, width = shape
    codec = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), codec, rate, (width, height))
    if not writer.isOpened():
        raise ConfigError(
            f"OpenCV cannot write a video of {width}x{height} as MP4 here: split "
            "the video into pictures, and give their folder"
        )
    return writer
