"""Look at an attention from one point of an image: what show_attention.py does."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from matplotlib.backends.registry import BackendFilter, backend_registry
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from torch import Tensor, nn

from mmcastling.analysis.attention_maps import (
    AttentionRows,
    attention_rows,
    mask_of,
    record_attention,
)
from mmcastling.attention import MaskThreshold
from mmcastling.checkpoint import load_checkpoint
from mmcastling.errors import ConfigError
from mmcastling.registry import type_name
from mmcastling.run.config import datasets_of
from mmcastling.run.runner import build_model, load_trained
from mmcastling.show.figures import HeatMap, plot_attention

Point = tuple[float, float]


@dataclass(frozen=True)
class AttentionView:
    """The attention of one query, and the image that it is laid over.

    Attributes:
        image: What the network saw, before normalisation and padding: RGB
            ``(H, W, 3)``.
        covered: ``(H, W)`` in pixels of the input that the grid of tokens covers,
            padding included.
        point: Where the query is, ``(x, y)`` in pixels of ``image``.
        grid: ``(H, W)`` of the tokens.
        extra_tokens: Tokens before those of the grid.
        query: Index of the query among all tokens.
        rows: Weights of the query on all tokens ``(N,)``, of one head or averaged.
        survivors: Fraction of pairs of the query, over the heads shown, that survive
            the mask.
        threshold: The mask's threshold.
        weight: The branch's factor.
        layer: The attention's path in the model.
        deployed: Whether the checkpoint's branch had been pruned.
        own_threshold: Whether ``threshold`` is the checkpoint's, or else was given.
        heads: Which heads ``rows`` are of, in words.
    """

    image: np.ndarray
    covered: tuple[int, int]
    point: Point
    grid: tuple[int, int]
    extra_tokens: int
    query: int
    rows: AttentionRows
    survivors: float
    threshold: MaskThreshold
    weight: float
    layer: str
    deployed: bool
    own_threshold: bool
    heads: str


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image in BGR, ``(H, W, 3)``.

    Raises:
        ConfigError: If it is missing or cannot be decoded.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"image {path} does not exist: check the path")
    try:
        image = mmcv.imread(path)
    except (OSError, cv2.error):
        image = None
    if image is None:
        raise ConfigError(
            f"image {path} ({path.stat().st_size} bytes) cannot be decoded: give a "
            "whole PNG or JPEG file"
        )
    return image


def view_attention(
    cfg: Config,
    source: str | os.PathLike[str],
    image: np.ndarray,
    point: Point,
    *,
    layer: int = -1,
    head: int | None = None,
    threshold: str | None = None,
) -> AttentionView:
    """The attention of the token under a point of an image.

    The image takes the way of a test image: the config's test pipeline, without what
    loads annotations, and the model's data preprocessor. It is then seen whole, also by
    a segmentor that tests in sliding windows.

    Args:
        cfg: A config from :func:`mmcastling.run.load_config`.
        source: A training or deployed checkpoint of that config.
        image: From :func:`read_image`.
        point: ``(x, y)`` in pixels of ``image``, from its upper left corner.
        layer: Which attention of the backbone, by depth. Defaults to -1 (the last).
        head: Which head, or None for their mean. Defaults to None.
        threshold: Show what this threshold would keep, such as ``'4/N'``, in place of
            the state that the checkpoint was saved in. The features below the layer
            are those of the checkpoint's state all the same. Defaults to None.

    Raises:
        CheckpointError: If the checkpoint cannot be read or does not fit.
        ConfigError: If the point lies outside the image, or in a part that the test
            pipeline cuts off.
        ValueError: If the model has no such castling attention or no such head, or the
            threshold cannot be read.
    """
    height, width = image.shape[:2]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ConfigError(
            f"point {point[0]:g} {point[1]:g} is outside the image of {width}x{height} "
            f"pixels: give x from 0 to {width - 1} and y from 0 to {height - 1}"
        )
    given = None if threshold is None else MaskThreshold.parse(threshold)
    checkpoint = load_checkpoint(source)
    transform, pack = _test_transforms(cfg)
    seen = transform(image)
    point = _follow(point, image.shape[:2], transform, seen["img"].shape[:2])

    model = build_model(cfg)
    load_trained(model, checkpoint, source)
    model.eval()
    rgb, inputs = _preprocess(model, pack(seen))
    call = record_attention(model, inputs, layer)
    covered = (inputs.shape[-2], inputs.shape[-1])
    query = call.token_at(point[0] / covered[1], point[1] / covered[0])
    own, weight = mask_of(call.mixer)
    if given is not None:
        own, weight = given, 1.0
    rows = attention_rows(
        call.q,
        call.k,
        query,
        threshold=own,
        weight=weight,
        reference_tokens=call.mixer.reference_tokens,
    )
    shown = rows.reduce_heads(head)
    masked = rows.masked if head is None else rows.masked[head]
    return AttentionView(
        image=rgb,
        covered=covered,
        point=point,
        grid=call.grid,
        extra_tokens=call.extra_tokens,
        query=query,
        rows=shown,
        survivors=(masked > 0).float().mean().item(),
        threshold=own,
        weight=weight,
        layer=call.name,
        deployed=call.mixer.deploy,
        own_threshold=given is None,
        heads=f"mean of {len(rows.softmax)} heads" if head is None else f"head {head}",
    )


def _test_transforms(
    cfg: Config,
) -> tuple[Callable[[np.ndarray], dict[str, Any]], Callable[[dict[str, Any]], Any]]:
    """What the test pipeline does to an image, and how it packs it."""
    dataset = next(datasets_of(cfg, "test"), None)
    if dataset is None or not dataset.get("pipeline"):
        raise ConfigError(
            f"config {cfg.filename} has no test_dataloader with a pipeline, which says "
            "how an image reaches the network: start from a config that has"
        )
    kinds = [(type_name(step["type"]), step) for step in dataset.pipeline]
    steps = [step for kind, step in kinds if not kind.startswith(("Load", "Pack"))]
    packing = [step for kind, step in kinds if kind.startswith("Pack")]
    change, pack = Compose(steps), Compose(packing)

    def transform(image: np.ndarray) -> dict[str, Any]:
        shape = image.shape[:2]
        results = change(dict(img=image, img_shape=shape, ori_shape=shape))
        if results is None:
            raise ConfigError("the config's test pipeline drops the image")
        return results

    return transform, pack


def _follow(
    point: Point,
    shape: tuple[int, int],
    transform: Callable[[np.ndarray], dict[str, Any]],
    seen: tuple[int, int],
) -> Point:
    """Where a point of the image lies in what the test pipeline makes of it.

    Pipelines resize, crop, pad and flip, and do not tell how: so an image whose colours
    are its coordinates is sent the same way, and a line fitted to each axis.
    """
    height, width = shape
    ramps = np.full((height, width, 3), 255, np.uint8)
    ramps[..., 0] = np.linspace(0, 255, width).round()
    ramps[..., 1] = np.linspace(0, 255, height).round()[:, None]
    moved = transform(ramps)["img"].astype(np.float64)
    inside = moved[..., 2] > 250  # padding has another colour
    result = []
    for axis, length in ((0, width), (1, height)):
        target = np.broadcast_to(
            np.arange(seen[1]) if axis == 0 else np.arange(seen[0])[:, None], seen
        )
        source = moved[..., axis] * (length - 1) / 255
        with np.errstate(all="ignore"):
            slope, offset = _line(target[inside], source[inside])
        error = np.abs(slope * target + offset - source)[inside]
        if not slope or not error.size or not error.mean() < 0.01 * length + 2:
            raise ConfigError(
                "the config's test pipeline moves pixels in a way that cannot be "
                "followed: leave all but resizing, cropping, padding and flipping out"
            )
        result.append((point[axis] - offset) / slope)
    # Rounding may put what lies on the border a fraction of a pixel beyond it.
    clipped = (min(max(result[0], 0), seen[1] - 1), min(max(result[1], 0), seen[0] - 1))
    if max(abs(result[0] - clipped[0]), abs(result[1] - clipped[1])) > 1.5:
        raise ConfigError(
            f"point {point[0]:g} {point[1]:g} is in a part of the image that the test "
            "pipeline of the config cuts off: choose one nearer to the middle"
        )
    return clipped


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    if x.size < 2 or np.ptp(x) == 0:
        return 0.0, 0.0
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset)


def _preprocess(model: nn.Module, packed: dict[str, Any]) -> tuple[np.ndarray, Tensor]:
    """What the network sees: in RGB for people, and as its input ``(1, 3, H, W)``."""
    rgb = packed["inputs"].permute(1, 2, 0).flip(2).byte().numpy()
    batch = model.data_preprocessor(pseudo_collate([packed]), False)
    inputs = batch["inputs"]
    inputs = torch.stack(list(inputs)) if isinstance(inputs, list) else inputs
    return rgb, inputs


def draw_attention(view: AttentionView, path: str | os.PathLike[str]) -> None:
    """Draw the four maps of a view over its image, as a PNG file.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    tokens, (_, columns) = len(view.rows.softmax), view.grid
    own = divmod(view.query - view.extra_tokens, columns)
    bar = f"{view.threshold.resolve(tokens) * tokens:.3g}/N"
    if view.survivors:
        mask = f"{100 * view.survivors:.2g}% of the pairs exceed {bar}"
    elif view.own_threshold and (view.weight == 0 or view.threshold.rejects_all):
        mask = "empty: " + ("pruned" if view.deployed else "masks have decayed")
    else:
        mask = f"empty: nothing exceeds {bar}"

    def heat_map(title: str, row: Tensor, note: str, signed: bool) -> HeatMap:
        row = row.cpu() if signed else row.cpu() * tokens
        caption = f"{note}\non itself {row[view.query]:.3g}"
        if view.extra_tokens:
            caption += f", on the class token {row[: view.extra_tokens].sum():.3g}"
        on_grid = row[view.extra_tokens :].reshape(view.grid).numpy()
        return HeatMap(title, caption, on_grid, signed)

    rows, unit = view.rows, "in units of 1/N, uniform attention"
    maps = [
        heat_map("softmax", rows.softmax, unit, False),
        heat_map("angular", rows.angular, "signed weights, what is deployed", True),
        heat_map("masked softmax", rows.masked, f"in 1/N; {mask}", False),
        heat_map("combined", rows.combined, "masked + angular, signed weights", True),
    ]
    title = f"{view.layer}, {view.grid[0]}x{columns} tokens, {view.heads}"
    plot_attention(view.image, maps, view.point, view.covered, own, title, path)


def click_point(image: np.ndarray) -> Point:
    """Show an image in a window and wait for a click.

    Args:
        image: From :func:`read_image`.

    Returns:
        ``(x, y)`` in pixels.

    Raises:
        ConfigError: If there is no display, or the window is closed without a click.
    """
    from matplotlib import pyplot  # picks a toolkit for windows when it is imported

    figure = None
    interactive = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    try:
        if pyplot.get_backend().lower() in {name.lower() for name in interactive}:
            figure = pyplot.figure()
    except (ImportError, RuntimeError):
        pass  # the toolkit that was asked for does not start
    if figure is None:
        raise ConfigError(
            f"--click needs a display and a toolkit for windows (tkinter or PyQt), and "
            f"matplotlib found none (backend {pyplot.get_backend()}): give --point X Y"
        )
    axes = figure.add_subplot()
    axes.imshow(image[..., ::-1])
    axes.set_title("click a point")
    clicked = pyplot.ginput(1, timeout=0)
    pyplot.close(figure)
    if not clicked:
        raise ConfigError("no point was clicked: run again, or give --point X Y")
    return clicked[0]
