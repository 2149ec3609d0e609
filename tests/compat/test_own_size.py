"""What a detector finds in an image does not depend on its neighbours in the batch."""

import pytest
import small_levit
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch.testing import assert_close

from mmcastling.compat import own_size
from mmcastling.run import load_config
from mmcastling.run.load import build_model

SIZES = [(96, 160), (128, 96), (96, 160), (70, 50)]
ALL = range(len(SIZES))
LAYERS = dict(
    embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=64, _delete_=True
)
DETECTORS = {
    "castling": (
        "mask_rcnn_castling_nano_nuclei",
        {
            "model.backbone.arch": LAYERS,
            "model.neck.in_channels": 64,
            "model.test_cfg.rcnn.max_per_img": 20,
            "model.test_cfg.rcnn.score_thr": 0.0,
            "model.test_cfg.rpn.max_per_img": 50,
        },
    ),
    "levit": (
        "retinanet_castling_levit_256_coco",
        {
            **small_levit.TWO_STAGES,
            "model.neck.out_channels": 32,
            "model.bbox_head.in_channels": 32,
            "model.bbox_head.feat_channels": 32,
            "model.bbox_head.num_classes": 1,
            "model.test_cfg.score_thr": 0.0,
        },
    ),
}
DETECTORS["softmax"] = (
    DETECTORS["castling"][0],
    DETECTORS["castling"][1]
    | {"model.backbone.attention": dict(type="softmax", _delete_=True)},
)


@pytest.fixture(scope="module", params=DETECTORS)
def detector(request, root):
    name, options = DETECTORS[request.param]
    torch.manual_seed(0)
    model = build_model(load_config(root / "configs" / f"{name}.py", options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, parameter.mean().item(), 0.05)
    return model


def images(model, members=ALL, training=False):
    inputs, samples = [], []
    for index in members:
        noise = torch.Generator().manual_seed(index)
        inputs.append(torch.rand(3, *SIZES[index], generator=noise) * 255)
        sample = DetDataSample(
            metainfo=dict(img_shape=SIZES[index], ori_shape=SIZES[index])
        )
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
        boxes = torch.tensor([[5.0, 5.0, 40.0, 45.0]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0]))
        samples.append(sample)
    data = dict(inputs=inputs, data_samples=samples)
    preprocessor = model.data_preprocessor
    preprocessor.pad_mask = False
    return preprocessor(data, training)


def predict(model, members=ALL):
    model.train(False)
    with torch.no_grad():
        return [
            sample.pred_instances
            for sample in model(**images(model, members), mode="predict")
        ]


def test_detections_are_those_of_the_image_alone(detector):
    together = predict(detector)
    for index, found in enumerate(together):
        (alone,) = predict(detector, [index])
        assert len(found) == len(alone) > 0
        for name in alone.keys():  # noqa: SIM118, instances are no dict
            if name == "masks":
                assert torch.equal(found.masks, alone.masks)
            else:
                assert_close(found[name], alone[name], atol=1e-4, rtol=1e-4)


def test_without_it_padding_changes_scores(detector):
    detector.test_cfg.own_size = False
    try:
        together = predict(detector)
    finally:
        del detector.test_cfg.own_size
    (alone,) = predict(detector, [3])
    found = together[3]
    assert len(found) != len(alone) or (found.scores - alone.scores).abs().max() > 1e-4


class Seen(Exception):
    """Ends a training pass once the head has its maps."""


def maps_for_the_head(model, members=ALL):
    def stop(head, args):
        raise Seen(args[0])

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # else its statistics tie the images of a batch together
    head = getattr(model, "rpn_head", None) or model.bbox_head
    hook = head.register_forward_pre_hook(stop)
    try:
        with pytest.raises(Seen) as stopped:
            model(**images(model, members, training=True), mode="loss")
    finally:
        hook.remove()
    return stopped.value.args[0]


def test_features_in_training_are_those_of_the_image_alone(detector):
    together = maps_for_the_head(detector)
    for index in range(len(SIZES)):
        for ours, alone in zip(
            together, maps_for_the_head(detector, [index]), strict=True
        ):
            height, width = alone.shape[2:]
            assert_close(ours[index, :, :height, :width], alone[0])
            assert not ours[index, :, height:].any()
            assert not ours[index, :, :, width:].any()
    sum(level.sum() for level in together).backward()
    assert all(p.grad is not None for p in detector.backbone.parameters())


def test_maps_at_other_strides_are_said_to_stay_together(detector, caplog):
    head = getattr(detector, "rpn_head", None) or detector.bbox_head
    strides = head.prior_generator.strides
    head.prior_generator.strides = [(7, 7)] * len(strides)
    own_size._warn.cache_clear()
    try:
        maps = maps_for_the_head(detector)
    finally:
        head.prior_generator.strides = strides
    assert len(maps[0]) == len(SIZES) and maps[0].shape[2] > 1
    assert f"{type(detector).__name__}: maps of backbone and neck" in caplog.text
