"""Whole detectors at 800x1333: from an image in memory to boxes and masks.

python benchmarks/detectors.py        # measure (6 minutes), store the result
python benchmarks/report.py           # write docs/speed.md from the stored results

Weights are random, with the first class made likely, so that post-processing has as
many boxes and masks as a detector may return: 1,000 proposals, 100 detections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from common import ROOT, Benchmark, Contender, Size, Target, median
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmcastling.analysis import PartTimer, count_model_macs
from mmcastling.verbs import switch_to_deploy

SIZE: Size = (800, 1333)
PADDED: Size = (800, 1344)
ROUNDS = 5
PARTS_ROUNDS = 3


def detector(config: str) -> Callable[[], nn.Module]:
    """Builds a detector from a config of ours, or of mmdet where named ``mmdet::``."""

    def build() -> nn.Module:
        import mmcastling  # noqa: F401  (registers the backbones, and ops for mmcv)

        register_all_modules(init_default_scope=False)
        cfg = (
            get_config(config)
            if "::" in config
            else Config.fromfile(ROOT / "configs" / f"{config}.py")
        )
        with DefaultScope.overwrite_default_scope("mmdet"):
            model = MODELS.build(cfg.model)
        switch_to_deploy(model, inplace=True)
        make_first_class_likely(model)
        model.eval()
        return model

    return build


@torch.no_grad()
def make_first_class_likely(model: nn.Module) -> None:
    """Give every box a confident class, so that none falls below the threshold."""
    roi_head = getattr(model, "roi_head", None)
    if roi_head is not None:
        roi_head.bbox_head.fc_cls.bias[0] = 8.0
    else:
        head = model.bbox_head
        head.retina_cls.bias[:: head.cls_out_channels] = 2.0


def picture(size: Size) -> tuple[dict[str, Any]]:
    """A seeded picture of noise, as the pipeline hands it to a detector."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    info = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0), img_id=0)
    return (dict(inputs=[pixels], data_samples=[DetDataSample(metainfo=info)]),)


def test_step(model: nn.Module, data: dict[str, Any]) -> Callable[[], Any]:
    return functools.partial(torch.inference_mode()(model.test_step), data)


DETECTORS = {
    "Mask R-CNN Castling-S": "mask_rcnn_castling_s_coco",
    "Mask R-CNN ViT-S softmax": "mask_rcnn_softmax_s_coco",
    "Mask R-CNN Castling-MViTv2-T": "mask_rcnn_castling_mvit_t_coco",
    "Mask R-CNN MViTv2-T softmax": "mask_rcnn_softmax_mvit_t_coco",
    "Mask R-CNN Swin-T": "mask_rcnn_swin_t_coco",
    "Mask R-CNN R-50": "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "RetinaNet Castling-LeViT-256": "retinanet_castling_levit_256_coco",
    "RetinaNet PVTv2-B1": "mmdet::pvt/retinanet_pvtv2-b1_fpn_1x_coco.py",
    "RetinaNet PVTv2-B2": "mmdet::pvt/retinanet_pvtv2-b2_fpn_1x_coco.py",
}


@torch.inference_mode()
def where_time_goes(device: str) -> dict[str, Any]:
    """Median seconds of each detector's parts, and how many boxes it returned.

    Detectors take turns here too. ``heads`` is all that comes after the neck, of which
    ``post_processing`` is a part.
    """
    torch.manual_seed(0)
    (data,) = picture(SIZE)
    models = {name: detector(config)().to(device) for name, config in DETECTORS.items()}
    parts: dict[str, Any] = {name: {} for name in models}
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
                (sample,) = model.test_step(data)
                parts[name]["detections"] = len(sample.pred_instances)
        for name, (preparing, timer) in timers.items():
            seconds = timer.parts
            parts[name].update(
                data_preprocessor=preparing.median,
                backbone=seconds["backbone"],
                neck=seconds["neck"],
                heads=seconds["heads"] + seconds["post-processing"],
                post_processing=seconds["post-processing"],
            )
    return dict(parts=parts)


def targets(result: dict[str, Any]) -> list[Target]:
    """What was to be reached."""
    castled, swin = "Mask R-CNN Castling-S", "Mask R-CNN Swin-T"
    ratio = median(result, castled, SIZE) / median(result, swin, SIZE)
    return [Target("Mask R-CNN at 800x1333: time over Swin-T's", ratio, 1)]


BENCHMARK = Benchmark(
    name="detectors",
    contenders={
        name: Contender(
            detector(config),
            picture,
            make_pass=test_step,
            count=lambda model: count_model_macs(model, PADDED).macs,
        )
        for name, config in DETECTORS.items()
    },
    repeats={SIZE: ROUNDS},
    extra=where_time_goes,
)

if __name__ == "__main__":
    BENCHMARK.main(__doc__)
