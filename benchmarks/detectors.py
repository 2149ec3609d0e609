"""Whole detectors, from an image in memory to boxes and masks, and from a file.

python benchmarks/detectors.py        # measure (25 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

Weights are random, with the first class made likely, so that post-processing has as
many boxes and masks as a detector may return: of Mask R-CNN 100 detections of 1,000
proposals, of RTMDet 300 of 1,000 candidates. Some are measured in each precision that
this machine gains by, too.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from common import ROOT, Benchmark, Contender, Size, Target, median
from mmcv.transforms import Compose
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmcastling.analysis import PartTimer, count_model_macs, paired_medians
from mmcastling.deploy import may_gain, set_precision
from mmcastling.verbs import switch_to_deploy

SIZE: Size = (800, 1333)
PADDED: Size = (800, 1344)
LIGHT: tuple[Size, ...] = ((320, 320), (640, 640), (1280, 1280))
ROUNDS = 5
CANDIDATES = 1000  # before suppression, as proposals of Mask R-CNN
PARTS_ROUNDS = 3
# Detectors at 800x1333, and those in lower precision as well; light ones.
CASTLED, SWIN, SMALL = "Mask R-CNN Castling-S", "Mask R-CNN Swin-T", "RTMDet-s"
LIGHT_CASTLED = "RTMDet Castling-LeViT-256"
DETECTORS = {
    CASTLED: "mask_rcnn_castling_s_coco",
    "Mask R-CNN ViT-S softmax": "mask_rcnn_softmax_s_coco",
    "Mask R-CNN Castling-MViTv2-T": "mask_rcnn_castling_mvit_t_coco",
    "Mask R-CNN MViTv2-T softmax": "mask_rcnn_softmax_mvit_t_coco",
    SWIN: "mask_rcnn_swin_t_coco",
    "Mask R-CNN R-50": "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "RetinaNet Castling-LeViT-256": "retinanet_castling_levit_256_coco",
    "RetinaNet PVTv2-B1": "mmdet::pvt/retinanet_pvtv2-b1_fpn_1x_coco.py",
    "RetinaNet PVTv2-B2": "mmdet::pvt/retinanet_pvtv2-b2_fpn_1x_coco.py",
}
LIGHT_DETECTORS = {
    LIGHT_CASTLED: "rtmdet_castling_levit_256_coco",
    "RTMDet-tiny": "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    SMALL: "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py",
}
LOWERED = (["bf16"] if may_gain("bf16") else []) + ["int8"]


def detector(config: str, precision: str = "fp32") -> Callable[[], nn.Module]:
    """Builds a detector from a config of ours, or of mmdet where named ``mmdet::``."""

    def build() -> nn.Module:
        import mmcastling  # noqa: F401  (registers the backbones, and ops for mmcv)

        register_all_modules(init_default_scope=False)
        cfg = config_of(config)
        cfg.model.backbone.pop("init_cfg", None)  # weights are random
        with DefaultScope.overwrite_default_scope("mmdet"):
            model = MODELS.build(cfg.model)
        switch_to_deploy(model, inplace=True)
        make_first_class_likely(model)
        model.eval()
        set_precision(model.requires_grad_(False), precision)
        return model

    return build


def config_of(config: str) -> Config:
    """A config of ours, or of mmdet where named ``mmdet::``."""
    if "::" in config:
        return get_config(config)
    return Config.fromfile(ROOT / "configs" / f"{config}.py")


@torch.no_grad()
def make_first_class_likely(model: nn.Module) -> None:
    """Give every box a confident class, so that none falls below the threshold."""
    roi_head = getattr(model, "roi_head", None)
    if roi_head is not None:
        roi_head.bbox_head.fc_cls.bias[0] = 8.0
        return
    head = model.bbox_head
    if hasattr(head, "retina_cls"):
        head.retina_cls.bias[:: head.cls_out_channels] = 2.0
        return
    for scores, sides in zip(head.rtm_cls, head.rtm_reg, strict=True):
        scores.bias[0] = 2.0
        sides.bias.fill_(2.0)  # boxes with an area
    # Of random weights all places are candidates, of trained ones a few hundred.
    model.test_cfg.nms_pre = head.test_cfg.nms_pre = CANDIDATES


def picture(size: Size) -> tuple[dict[str, Any]]:
    """A seeded picture of noise, as the pipeline hands it to a detector."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    info = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0)
    return (dict(inputs=[pixels], data_samples=[DetDataSample(metainfo=info)]),)


def test_step(model: nn.Module, data: dict[str, Any]) -> Callable[[], Any]:
    return functools.partial(torch.inference_mode()(model.test_step), data)


def contenders() -> dict[str, Contender]:
    """By name; in lower precision with its name after a comma."""
    found: dict[str, Contender] = {}

    def add(name: str, config: str, sizes: tuple[Size, ...], *lowered: str) -> None:
        for precision in ("fp32", *lowered):
            title = name if precision == "fp32" else f"{name}, {precision}"
            found[title] = Contender(
                detector(config, precision),
                picture,
                sizes=sizes,
                make_pass=test_step,
                count=functools.partial(_macs, config, max(sizes)),
            )

    for name, config in DETECTORS.items():
        add(name, config, (SIZE,), *(LOWERED if name in (CASTLED, SWIN) else ()))
    for name, config in LIGHT_DETECTORS.items():
        add(name, config, LIGHT, *LOWERED)
    return found


@functools.cache
def _macs(config: str, size: Size, _: nn.Module) -> int:
    return count_model_macs(detector(config)(), PADDED if size == SIZE else size).macs


@torch.inference_mode()
def where_time_goes(device: str) -> dict[str, Any]:
    """Median seconds of each detector's parts, and how many boxes it returned.

    Detectors take turns here too. ``heads`` is all that comes after the neck, of which
    ``post_processing`` is a part. ``reading`` is what the config's pipeline does with a
    JPEG of the size measured at: decode, resize, pad, pack.
    """
    torch.manual_seed(0)
    chosen = {
        name: SIZE if SIZE in contender.sizes else max(LIGHT)
        for name, contender in CONTENDERS.items()
    }
    models = {name: CONTENDERS[name].build().to(device) for name in chosen}
    data = {size: picture(size)[0] for size in (SIZE, max(LIGHT))}
    reading = {
        name: reading_of(config, chosen[name])
        for name, config in {**DETECTORS, **LIGHT_DETECTORS}.items()
    }
    parts: dict[str, Any] = {
        name: dict(reading=reading[name.partition(",")[0]]) for name in chosen
    }
    with ExitStack() as timing:
        timers = {
            name: (
                timing.enter_context(PartTimer(model.data_preprocessor)),
                timing.enter_context(PartTimer(model)),
            )
            for name, model in models.items()
        }
        for _ in range(PARTS_ROUNDS):
            for name, model in models.items():
                (sample,) = model.test_step(data[chosen[name]])
                parts[name]["detections"] = len(sample.pred_instances)
        for name, (preparing, timer) in timers.items():
            seconds = timer.parts
            parts[name].update(
                size=list(chosen[name]),
                data_preprocessor=preparing.median,
                backbone=seconds["backbone"],
                neck=seconds["neck"],
                heads=seconds["heads"] + seconds["post-processing"],
                post_processing=seconds["post-processing"],
            )
    return dict(parts=parts)


def reading_of(config: str, size: Size) -> float:
    """Median seconds from a JPEG to what a detector's data preprocessor is given."""
    steps = [
        step
        for step in config_of(config).test_dataloader.dataset.pipeline
        if step["type"] != "LoadAnnotations"
    ]
    register_all_modules(init_default_scope=False)
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    with (
        tempfile.TemporaryDirectory() as folder,
        DefaultScope.overwrite_default_scope("mmdet"),
    ):
        path = Path(folder) / "picture.jpg"
        cv2.imwrite(str(path), cv2.GaussianBlur(noise, (0, 0), 3))
        pipeline = Compose(steps)
        read = functools.partial(pipeline, dict(img_path=str(path), img_id=0))
        return paired_medians(dict(read=read), ROUNDS)["read"]


def targets(result: dict[str, Any]) -> list[Target]:
    """What was to be reached."""
    names = {cell["contender"] for cell in result["cells"]}
    swin = median(result, SWIN, SIZE)
    ratio = median(result, CASTLED, SIZE) / swin
    found = [Target("Mask R-CNN at 800x1333: time over Swin-T's", ratio, 1)]
    lowered = [name for name in LOWERED if f"{CASTLED}, {name}" in names]
    if lowered:
        best = min(lowered, key=lambda n: median(result, f"{CASTLED}, {n}", SIZE))
        ours = median(result, f"{CASTLED}, {best}", SIZE)
        claim = f"Mask R-CNN at 800x1333 in {best}: time over Swin-T's"
        same = median(result, f"{SWIN}, {best}", SIZE)
        found.append(Target(f"{claim} in float32", ours / swin, 0.45))
        found.append(Target(f"{claim} in {best}", ours / same, 0.8))
    if SMALL in names:
        large = max(LIGHT)
        ratio = median(result, LIGHT_CASTLED, large) / median(result, SMALL, large)
        found.append(Target("RTMDet at 1280x1280: time over RTMDet-s's", ratio, 1))
    if parts := result["parts"].get(f"{CASTLED}, {lowered[0]}" if lowered else ""):
        keys = ("reading", "data_preprocessor", "backbone", "neck", "heads")
        share = parts["post_processing"] / sum(parts[key] for key in keys)
        claim = f"Mask R-CNN in {lowered[0]}: post-processing's share of the whole"
        found.append(Target(claim, share, 0.1))
    return found


CONTENDERS = contenders()
BENCHMARK = Benchmark(
    name="detectors",
    contenders=CONTENDERS,
    repeats={SIZE: ROUNDS} | dict.fromkeys(LIGHT, ROUNDS),
    extra=where_time_goes,
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
