"""Paint predictions with the visualizers of the toolboxes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from mmengine.registry import VISUALIZERS, DefaultScope
from mmengine.structures import BaseDataElement

_KINDS = dict(mmdet="DetLocalVisualizer", mmseg="SegLocalVisualizer")
_KINDS |= dict(mmpretrain="UniversalVisualizer")
_READABLE = 224  # shorter side of a classifier's picture, for its text to be legible

_count = itertools.count()


def as_rgb(image: np.ndarray) -> np.ndarray:
    """A picture to look at, RGB uint8 ``(H, W, 3)``, of any that a network takes.

    That is ``(H, W)`` or ``(H, W, C)``, with colours first and in BGR. What exceeds 8
    bits is scaled to the brightest pixel.
    """
    if image.dtype != np.uint8:
        factor = 255 / max(float(image.max(initial=0)), 255.0)
        image = (image.astype(np.float32) * factor).clip(0, 255).astype(np.uint8)
    channels = np.atleast_3d(image)[..., :3]
    if channels.shape[2] < 3:
        channels = channels[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(channels[..., ::-1])


class Painter:
    """Draws boxes and masks, an overlay of classes, or a label.

    The scope is the toolbox, mmdet, mmseg or mmpretrain; ``classes`` and ``palette``
    are a sequence each, or None. Detections with lower scores are not drawn.
    """

    def __init__(
        self, scope: str, dataset_meta: dict[str, Any], score_thr: float = 0.3
    ) -> None:
        self.scope = scope
        self.score_thr = score_thr
        with DefaultScope.overwrite_default_scope(scope):
            spec = dict(type=_KINDS[scope], name=f"painter_{next(_count)}")
            self.visualizer = VISUALIZERS.build(spec)
        classes, palette = dataset_meta["classes"], dataset_meta["palette"]
        if scope == "mmseg":  # which draws nothing without names and colours
            classes = classes or [f"class {index}" for index in range(256)]
            if not palette or len(palette) < len(classes):
                noise = np.random.default_rng(0)
                palette = noise.integers(0, 256, (len(classes), 3)).tolist()
        palette = None if palette is None else list(map(tuple, palette))
        self.visualizer.dataset_meta = dict(classes=classes, palette=palette)

    def __call__(self, image: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        """A picture, see :func:`as_rgb`, as BGR with its prediction drawn on it.

        That of a classifier may be larger.
        """
        rgb = as_rgb(image)
        if self.scope == "mmpretrain":
            resize = max(_READABLE, min(rgb.shape[:2]))
            self.visualizer.visualize_cls(rgb, sample, draw_gt=False, resize=resize)
        elif self.scope == "mmseg":
            self.visualizer.add_datasample("", rgb, sample, draw_gt=False)
        else:
            # mmdet varies the colour of each mask at random: a video would flicker.
            state = np.random.get_state()
            np.random.seed(0)
            self.visualizer.add_datasample(
                "", rgb, sample, draw_gt=False, pred_score_thr=self.score_thr
            )
            np.random.set_state(state)
        painted = self.visualizer.get_image()
        return np.ascontiguousarray(painted[..., ::-1], dtype=np.uint8)

    def shown(self, sample: BaseDataElement) -> str:
        """What the picture shows, in words."""
        if self.scope == "mmdet":
            count = int((sample.pred_instances.scores > self.score_thr).sum())
            return f"{count} above {self.score_thr:g}"
        if self.scope == "mmseg":
            return f"{len(np.unique(sample.pred_sem_seg.data.cpu()))} classes"
        label = int(sample.pred_label[0])
        classes = self.visualizer.dataset_meta["classes"]
        name = classes[label] if classes else f"class {label}"
        return f"{name} {float(sample.pred_score[label]):.2f}"
