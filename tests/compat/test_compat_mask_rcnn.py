"""mmdet's stock Mask R-CNN on whatever ops this installation has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mmcastling  # noqa: F401, supplies the ops

mmdet = pytest.importorskip("mmdet")


@pytest.fixture
def mmdet_scope() -> Iterator[None]:
    from mmdet.utils import register_all_modules
    from mmengine.registry import DefaultScope

    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def test_mask_rcnn_trains_and_predicts(mmdet_scope: None) -> None:
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config

    configs = Path(mmdet.__file__).parent / ".mim/configs"
    config = Config.fromfile(configs / "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py").model
    config.backbone.init_cfg = None  # no download
    config.test_cfg.rcnn.score_thr = 0.0  # so that an untrained model finds something
    torch.manual_seed(0)
    model = MODELS.build(config)

    batch = demo_mm_inputs(1, [[3, 128, 128]], num_classes=80, with_mask=True)
    data = model.data_preprocessor(batch, True)
    losses = model.loss(data["inputs"], data["data_samples"])
    # The mask loss reaches the feature maps through RoIAlign only.
    finest = model.neck.fpn_convs[0].conv.weight
    (grad,) = torch.autograd.grad(losses["loss_mask"].sum(), finest, retain_graph=True)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    loss, _ = model.parse_losses(losses)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)

    model.eval()
    data = model.data_preprocessor(batch, False)
    with torch.no_grad():
        (sample,) = model.predict(data["inputs"], data["data_samples"])
    found = sample.pred_instances
    assert 0 < len(found) <= config.test_cfg.rcnn.max_per_img
    assert found.masks.shape == (len(found), 128, 128)
    assert found.bboxes.isfinite().all()
