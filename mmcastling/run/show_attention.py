"""Look at an attention from one point of an image: what show_attention.py does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.registry import BackendFilter, backend_registry
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import Tensor

from mmcastling.analysis.attention_maps import (
    OFF,
    AttentionRows,
    MixerCall,
    record_attention,
)
from mmcastling.attention import MaskThreshold
from mmcastling.checkpoint import load_checkpoint
from mmcastling.errors import ConfigError
from mmcastling.registry import type_name
from mmcastling.run.load import load_model, preprocess
from mmcastling.run.pipelines import FilePipeline
from mmcastling.show.figures import save_figure
from mmcastling.show.painting import as_rgb

Point = tuple[float, float]
"""``(x, y)`` in pixels from the upper left corner."""


@dataclass(frozen=True)
class AttentionView:
    """The attention of one query, and the image that it is laid over.

    Attributes:
        image: What the network saw, before normalisation and padding: RGB
            ``(H, W, 3)``.
        covered: ``(H, W)`` in pixels of the input that the grid of tokens covers,
            padding included.
        query: Index of the token under the point, among all tokens.
        rows: Its weights on all tokens ``(N,)``, of one head or averaged.
        survivors: Fraction of its pairs, over these heads, that survive the mask.
        own_threshold: Whether ``threshold`` is the checkpoint's, or else was given.
    """

    image: np.ndarray
    covered: tuple[int, int]
    point: Point
    call: MixerCall
    query: int
    rows: AttentionRows
    heads: str
    survivors: float
    threshold: MaskThreshold
    weight: float
    own_threshold: bool


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
        image: As :meth:`mmcastling.run.pipelines.FilePipeline.read` gives it.
        point: Where to look from.
        layer: Which attention of the backbone, by depth, negative from the end.
        head: Which head, or None for their mean.
        threshold: Show what this threshold would keep, such as ``'4/N'``, in place of
            the state that the checkpoint was saved in. The features below the layer
            are those of the checkpoint's state all the same. Defaults to None.

    Raises:
        UserError: If checkpoint or threshold cannot be used, the test pipeline cuts the
            point off, or the model has no such castling attention or head.
    """
    height, width = image.shape[:2]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ConfigError(
            f"point {point[0]:g} {point[1]:g} is outside the image of {width}x{height} "
            f"pixels: give x from 0 to {width - 1} and y from 0 to {height - 1}"
        )
    mask, weight = OFF if threshold is None else MaskThreshold.parse(threshold), 1.0
    checkpoint = load_checkpoint(source)
    steps = FilePipeline(cfg).steps
    packing = [step for step in steps if type_name(step["type"]).startswith("Pack")]
    change = Compose([step for step in steps if step not in packing])

    def transform(image: np.ndarray) -> dict[str, Any]:
        shape = image.shape[:2]
        results = change(dict(img=image, img_shape=shape, ori_shape=shape))
        if results is None:
            raise ConfigError("the config's test pipeline drops the image")
        return results

    seen = transform(image)
    point = _follow(point, image.shape[:2], transform, seen["img"].shape[:2])
    model = load_model(cfg, checkpoint, source)
    packed = Compose(packing)(seen)
    inputs = preprocess(model, packed)
    call = record_attention(model, inputs, layer)
    covered = (inputs.shape[-2], inputs.shape[-1])
    query = call.token_at(point[0] / covered[1], point[1] / covered[0])
    if threshold is None and (branch := call.mixer.branch):
        mask, weight = branch.threshold, branch.weight
    rows = call.rows(query, mask, weight)
    of_head = rows.reduce_heads(head)
    masked = rows.masked if head is None else of_head.masked
    return AttentionView(
        image=as_rgb(packed["inputs"].permute(1, 2, 0).numpy()),
        covered=covered,
        point=point,
        call=call,
        query=query,
        rows=of_head,
        heads=f"mean of {len(rows.softmax)} heads" if head is None else f"head {head}",
        survivors=(masked > 0).float().mean().item(),
        threshold=mask,
        weight=weight,
        own_threshold=threshold is None,
    )


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
    y, x = np.nonzero(moved[..., 2] > 250)  # padding has another colour
    result = []
    for axis, (target, length) in enumerate(((x, width), (y, height))):
        source = moved[y, x, axis] * (length - 1) / 255
        slope = offset = 0.0
        if np.unique(target).size > 1:
            slope, offset = np.polyfit(target, source, 1)
        error = np.abs(slope * target + offset - source)
        if not slope or not error.mean() < 0.01 * length + 2:
            raise ConfigError(
                "the config's test pipeline moves pixels in a way that cannot be "
                "followed: leave all but resizing, cropping, padding and flipping out"
            )
        result.append(float((point[axis] - offset) / slope))
    # Rounding may put what lies on the border a fraction of a pixel beyond it.
    clipped = (min(max(result[0], 0), seen[1] - 1), min(max(result[1], 0), seen[0] - 1))
    if max(abs(result[0] - clipped[0]), abs(result[1] - clipped[1])) > 1.5:
        raise ConfigError(
            f"point {point[0]:g} {point[1]:g} is in a part of the image that the test "
            "pipeline of the config cuts off: choose one nearer to the middle"
        )
    return clipped


def draw_attention(view: AttentionView, path: str | os.PathLike[str]) -> None:
    """Draw the four maps of a view over its image, as a PNG file.

    Colours span the weights on other tokens; the query's own may lie beyond. Signed
    maps have white at zero.
    """
    height, width = view.image.shape[:2]
    aspect = min(max(height / width, 0.4), 2.0)
    figure = Figure(figsize=(15.0, 3.0 * aspect + 1.25), layout="constrained")
    rows, columns = view.call.grid
    figure.suptitle(
        f"{view.call.name}, {rows}x{columns} tokens, {view.heads}", fontsize=10
    )
    # Bars have a row of their own, so that all images are of one size.
    panels, bars = figure.subplots(2, 5, height_ratios=(3.0 * aspect, 0.1))
    panels[0].imshow(view.image)
    panels[0].set_title("image and query")
    bars[0].set_axis_off()
    maps = (
        ("softmax", "in units of 1/N, uniform attention", False),
        ("angular", "signed weights, what is deployed", True),
        ("masked softmax", f"in 1/N; {_about_mask(view)}", False),
        ("combined", "masked + angular, signed weights", True),
    )
    for axes, bar, (title, note, signed) in zip(
        panels[1:], bars[1:], maps, strict=True
    ):
        weights = getattr(view.rows, title.partition(" ")[0]).cpu()
        weights = weights if signed else weights * len(weights)
        axes.set_title(title)
        drawn = _lay_over(axes, view, weights, signed)
        figure.colorbar(drawn, cax=bar, orientation="horizontal")
        note += f"\non itself {weights[view.query]:.3g}"
        if before := view.call.extra_tokens:
            note += f", on the class token {weights[:before].sum():.3g}"
        bar.xaxis.set_major_locator(MaxNLocator(4))
        bar.tick_params(labelsize=7)
        bar.set_xlabel(note, fontsize=8)
    for axes in panels:
        for colour, line in (("white", 3.5), ("limegreen", 1.8)):
            axes.plot(*view.point, "o", mfc="none", mec=colour, ms=10, mew=line)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks([])
    save_figure(figure, path, dpi=110)


def _about_mask(view: AttentionView) -> str:
    tokens = len(view.rows.softmax)
    bar = f"{view.threshold.resolve(tokens) * tokens:.3g}/N"
    if view.survivors:
        return f"{100 * view.survivors:.2g}% of the pairs exceed {bar}"
    if view.own_threshold and (view.weight == 0 or view.threshold.rejects_all):
        return f"empty: {'pruned' if view.call.mixer.deploy else 'masks have decayed'}"
    return f"empty: nothing exceeds {bar}"


def _lay_over(
    axes: Axes, view: AttentionView, weights: Tensor, signed: bool
) -> AxesImage:
    """Draw weights ``(N,)`` on the grid of tokens over the image in grey."""
    axes.imshow(view.image.astype(float).mean(axis=2), cmap="gray", vmin=0, vmax=255)
    on_grid = weights[view.call.extra_tokens :]
    elsewhere = on_grid.abs()
    elsewhere[view.query - view.call.extra_tokens] = 0.0
    limit = float(elsewhere.max()) or 1.0
    return axes.imshow(
        on_grid.reshape(view.call.grid).numpy(),
        cmap="RdBu_r" if signed else "inferno",
        vmin=-limit if signed else 0.0,
        vmax=limit,
        extent=(-0.5, view.covered[1] - 0.5, view.covered[0] - 0.5, -0.5),
        alpha=0.75,
        interpolation="nearest",
    )


def click_point(image: np.ndarray) -> Point:
    """Show an image in a window and wait for a click."""
    from matplotlib import pyplot  # picks a toolkit for windows when it is imported

    interactive = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
    figure, backend = None, pyplot.get_backend()
    with contextlib.suppress(ImportError, RuntimeError):  # a toolkit does not start
        if backend.lower() in {name.lower() for name in interactive}:
            figure = pyplot.figure()
    if figure is None:
        raise ConfigError(
            f"--click needs a display and a toolkit for windows (tkinter or PyQt), and "
            f"matplotlib found none (backend {backend}): give --point X Y"
        )
    axes = figure.add_subplot()
    axes.imshow(as_rgb(image))
    axes.set_title("click a point")
    clicked = pyplot.ginput(1, timeout=0)
    pyplot.close(figure)
    if not clicked:
        raise ConfigError("no point was clicked: run again, or give --point X Y")
    return clicked[0]
