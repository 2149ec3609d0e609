"""MACs: against totals worked out by hand, for layers and for whole models."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmcastling  # noqa: F401  (makes mmdet importable without compiled mmcv ops)
from mmcastling.analysis import ComplexityReport, count_macs, count_model_macs

C, HIDDEN, BLOCKS, PATCH = 16, 32, 2, 16
VIT = dict(
    type="mmpretrain.VisionTransformer",
    arch=dict(
        embed_dims=C, num_layers=BLOCKS, num_heads=2, feedforward_channels=HIDDEN
    ),
    img_size=64,
    patch_size=PATCH,
)
STRIDES = [4, 8, 16, 32, 64]
LEVELS = 8  # channels of the pyramid
SHAPE = (64, 96)


def build(scope: str, cfg: dict) -> nn.Module:
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(ConfigDict(copy.deepcopy(cfg)))


def vit_macs(height: int, width: int, cls_token: bool = True) -> int:
    patches = (height // PATCH) * (width // PATCH)
    n = patches + cls_token
    block = n * (4 * C * C + 2 * C * HIDDEN) + 2 * n * n * C
    return patches * 3 * PATCH**2 * C + BLOCKS * block


def pyramid_macs(height: int, width: int) -> int:
    n = (height // 16) * (width // 16)  # positions of the backbone's map
    up_4 = n * 4 * C * (C // 2) + 4 * n * 4 * (C // 2) * (C // 4)
    up_8 = n * 4 * C * (C // 2)
    coarse = -(-height // 32) * -(-width // 32)
    positions = [(16 * n, C // 4), (4 * n, C // 2), (n, C), (coarse, C)]
    heads = sum(m * (c * LEVELS + 9 * LEVELS * LEVELS) for m, c in positions)
    return up_4 + up_8 + heads


def pyramid_positions(height: int, width: int) -> int:
    return sum(-(-height // s) * -(-width // s) for s in STRIDES)


# ------------------------------------------------------------------------ operations


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def of(function) -> int:
    return count_macs(Calls(function), ()).macs


def test_layers_agree_with_their_formulas():
    x = torch.randn(2, 4, 5, 7)
    positions = 2 * 5 * 7

    assert count_macs(nn.Linear(7, 3), x).macs == 2 * 4 * 5 * 7 * 3
    assert count_macs(nn.Conv2d(4, 6, 1), x).macs == positions * 4 * 6
    grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    assert count_macs(grouped, x).macs == positions * 2 * 8 * 9
    depthwise = nn.Conv1d(4, 4, 9, padding=4, groups=4)
    assert count_macs(depthwise, x[0, :, 0]).macs == 7 * 4 * 9
    deconvolution = nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert count_macs(deconvolution, x).macs == positions * 4 * 6 * 4
    for free in (nn.LayerNorm(7), nn.GELU(), nn.Softmax(-1), nn.MaxPool2d(2)):
        assert count_macs(free, x).macs == 0


def test_products_agree_with_their_formulas():
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 12, 8)

    assert of(lambda: q @ k.mT) == 2 * 3 * 10 * 12 * 8
    assert of(lambda: torch.einsum("bhnd,bhmd->bhnm", q, k)) == 2 * 3 * 10 * 12 * 8
    context = "bhmd,bhme->bhde"  # the product linear attention starts with
    assert of(lambda: torch.einsum(context, k, k)) == 2 * 3 * 12 * 8 * 8
    assert of(lambda: q[0, 0] @ k[0, 0, 0]) == 10 * 8
    assert of(lambda: q[0, 0, 0] @ k[0, 0, 0]) == 8
    assert of(lambda: torch.addmv(q[0, 0, :, 0], q[0, 0], k[0, 0, 0])) == 10 * 8


@pytest.mark.parametrize(
    ("value_dim", "masked", "dtype"),
    [
        (8, False, torch.float32),
        (5, False, torch.float32),
        (8, True, torch.float32),
        (8, False, torch.bfloat16),
    ],
)
def test_fused_attention_is_not_free(value_dim, masked, dtype):
    q = torch.randn(2, 3, 10, 8, dtype=dtype)
    k = torch.randn(2, 3, 12, 8, dtype=dtype)
    v = torch.randn(2, 3, 12, value_dim, dtype=dtype)
    mask = torch.zeros(10, 12, dtype=dtype) if masked else None

    macs = of(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    assert macs == 2 * 3 * 10 * 12 * (8 + value_dim)


def test_the_fast_path_of_torchs_own_attention_is_not_free():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(1, 5, 8)
    attention = 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8
    enabled = torch.backends.mha.get_fastpath_enabled()

    assert count_macs(layer.self_attn, (x, x, x)).macs == attention
    assert count_macs(layer, x).macs == attention + 2 * 5 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_deformable_convolution_counts_as_the_plain_one():
    from torchvision.ops import deform_conv2d

    x, offset = torch.randn(2, 4, 5, 7), torch.zeros(2, 18, 5, 7)
    weight = torch.randn(6, 2, 3, 3)  # two groups

    macs = of(lambda: deform_conv2d(x, offset, weight, padding=1))

    assert macs == of(lambda: F.conv2d(x, weight, padding=1, groups=2))


# ----------------------------------------------------------------------- the report


def test_breakdown_adds_up_and_names_the_children():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.list = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.head = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
            self.unused = nn.Linear(4, 9)
            self.scale = nn.Parameter(torch.ones(4, 4))
            self.tied = self.list[0]

        def forward(self, x):
            for layer in self.list:
                x = layer(x)
            return self.head.forward(x @ self.scale)  # past all hooks, as detectors do

    report = count_macs(Model(), torch.randn(5, 4))

    # 'tied' and 'list' are one module: whoever holds it, it is counted once.
    assert report.by_module.pop("tied", 0) + report.by_module.pop("list") == 5 * 16 * 3
    assert report.by_module == {"head": 5 * 8, "(self)": 5 * 16}
    assert report.macs == 5 * 16 * 3 + 5 * 8 + 5 * 16
    assert report.params == 3 * 20 + 10 + 45 + 16
    assert report.input_shape == (5, 4)


def test_child_called_by_a_child_counts_for_the_caller():
    class Caller(nn.Module):
        def forward(self, x, other):
            return other(other(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.caller, self.layer = Caller(), nn.Linear(4, 4)

        def forward(self, x):
            return self.caller(self.layer(x), self.layer)

    report = count_macs(Model(), torch.randn(1, 4))

    assert report.by_module == {"caller": 32, "layer": 16}


def test_report_cannot_be_changed():
    report = ComplexityReport(1, 2, (3,), {})
    with pytest.raises(FrozenInstanceError):
        report.macs = 0


def test_inputs_may_be_several():
    x = torch.randn(2, 4)
    assert count_macs(nn.Bilinear(4, 4, 1), (x, x)).input_shape == (2, 4)


def test_model_is_left_as_it_was_even_after_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            assert not any(m.training for m in self.modules())
            out = self.layer(self.norm(x))
            assert not out.requires_grad
            return out

    def state(model):
        training = {name: m.training for name, m in model.named_modules()}
        grads = {name: p.requires_grad for name, p in model.named_parameters()}
        own = {name: sorted(vars(m)) for name, m in model.named_modules()}
        return training, grads, own, copy.deepcopy(model.state_dict())

    model = Model()
    model.norm.eval()  # as frozen stages are
    model.layer.bias.requires_grad_(False)
    before = state(model)

    count_macs(model, torch.randn(3, 4))
    with pytest.raises(RuntimeError):
        count_macs(model, torch.randn(3, 5))

    after = state(model)
    assert after[:3] == before[:3]
    torch.testing.assert_close(after[3], before[3])


# ---------------------------------------------------------------------- whole models


@settings(max_examples=6, deadline=None)
@given(height=st.integers(1, 5), width=st.integers(1, 5))
def test_backbone_at_any_size(height, width):
    shape = (height * PATCH, width * PATCH)
    report = count_model_macs(build("mmpretrain", VIT), shape)

    assert report.macs == vit_macs(*shape)
    assert report.input_shape == (1, 3, *shape)


def test_classifier():
    head = dict(type="VisionTransformerClsHead", num_classes=5, in_channels=C)
    cfg = dict(type="ImageClassifier", backbone=VIT, head=head)

    report = count_model_macs(build("mmpretrain", cfg), SHAPE)

    assert report.by_module == {"backbone": vit_macs(*SHAPE), "head": 5 * C}


def dense_backbone() -> dict:
    return dict(
        backbone=dict(VIT, out_type="featmap", with_cls_token=False),
        neck=dict(
            type="mmcastling.SimpleFeaturePyramid",
            in_channels=C,
            out_channels=LEVELS,
        ),
    )


def test_segmentor():
    import mmseg.models  # noqa: F401

    head = dict(in_channels=LEVELS, channels=4, num_classes=3, num_convs=1)
    cfg = dict(
        type="EncoderDecoder",
        decode_head=dict(head, type="FCNHead", in_index=0, concat_input=False),
        auxiliary_head=dict(head, type="FCNHead", in_index=1, concat_input=False),
        **dense_backbone(),
    )

    report = count_model_macs(build("mmseg", cfg), SHAPE)

    stride_4 = SHAPE[0] // 4 * SHAPE[1] // 4
    assert report.by_module == {
        "backbone": vit_macs(*SHAPE, cls_token=False),
        "neck": pyramid_macs(*SHAPE),
        "decode_head": stride_4 * (9 * LEVELS * 4 + 4 * 3),
    }


def test_one_stage_detector():
    import mmdet.models  # noqa: F401

    cfg = dict(
        type="RetinaNet",
        bbox_head=dict(
            type="RetinaHead",
            num_classes=3,
            in_channels=LEVELS,
            feat_channels=6,
            stacked_convs=1,
            anchor_generator=dict(
                type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0], strides=STRIDES
            ),
        ),
        **dense_backbone(),
    )

    report = count_model_macs(build("mmdet", cfg), SHAPE)

    head = 9 * (2 * LEVELS * 6 + 6 * 2 * 3 + 6 * 2 * 4)
    assert report.by_module == {
        "backbone": vit_macs(*SHAPE, cls_token=False),
        "neck": pyramid_macs(*SHAPE),
        "bbox_head": pyramid_positions(*SHAPE) * head,
    }


def roi_extractor(size: int) -> dict:
    return dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=size, sampling_ratio=2),
        out_channels=LEVELS,
        featmap_strides=STRIDES[:4],
    )


def two_stage(cascade: bool, masks: bool, proposals: int, detections: int) -> nn.Module:
    """A two-stage detector with small heads and NMS that keeps almost nothing."""
    import mmdet.models  # noqa: F401

    coder = dict(type="DeltaXYWHBBoxCoder")
    bbox_head = dict(
        type="Shared2FCBBoxHead",
        in_channels=LEVELS,
        fc_out_channels=10,
        roi_feat_size=7,
        num_classes=3,
        reg_class_agnostic=True,
        bbox_coder=coder,
    )
    mask_head = dict(
        type="FCNMaskHead",
        num_convs=1,
        in_channels=LEVELS,
        conv_out_channels=6,
        num_classes=3,
    )
    nms = dict(type="nms", iou_threshold=0.01)
    roi_head = dict(
        type="CascadeRoIHead" if cascade else "StandardRoIHead",
        bbox_roi_extractor=roi_extractor(7),
        bbox_head=[bbox_head] * 2 if cascade else bbox_head,
    )
    if cascade:
        roi_head.update(num_stages=2, stage_loss_weights=[1, 0.5])
    if masks:
        roi_head.update(
            mask_roi_extractor=roi_extractor(14),
            mask_head=[mask_head] * 2 if cascade else mask_head,
        )
    cfg = dict(
        type="CascadeRCNN" if cascade else "MaskRCNN" if masks else "FasterRCNN",
        rpn_head=dict(
            type="RPNHead",
            in_channels=LEVELS,
            feat_channels=6,
            anchor_generator=dict(
                type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0], strides=STRIDES
            ),
            bbox_coder=coder,
        ),
        roi_head=roi_head,
        train_cfg=None,
        test_cfg=dict(
            rpn=dict(nms_pre=50, max_per_img=proposals, nms=nms, min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=nms, max_per_img=detections),
        ),
        **dense_backbone(),
    )
    return build("mmdet", cfg)


@pytest.mark.parametrize("cascade", [False, True], ids=["standard", "cascade"])
@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_two_stage_detector_has_the_proposals_of_its_test_config(cascade, masks):
    proposals, detections = 30, 7
    model = two_stage(cascade, masks, proposals, detections)

    report = count_model_macs(model, SHAPE)

    stages = 2 if cascade else 1
    box = 49 * LEVELS * 10 + 10 * 10 + 10 * 4 + 10 * 4
    mask = 196 * 9 * LEVELS * 6 + 196 * 4 * 6 * 6 + 28 * 28 * 6 * 3
    rpn = 9 * LEVELS * 6 + 6 * 2 + 6 * 2 * 4
    assert report.by_module == {
        "backbone": vit_macs(*SHAPE, cls_token=False),
        "neck": pyramid_macs(*SHAPE),
        "rpn_head": pyramid_positions(*SHAPE) * rpn,
        "roi_head": stages * (proposals * box + masks * detections * mask),
    }


def test_two_stage_count_depends_on_neither_weights_nor_state():
    model = two_stage(cascade=True, masks=True, proposals=30, detections=7)
    children = [name for name, _ in model.named_modules()]
    own = {name: sorted(vars(m)) for name, m in model.named_modules()}
    first = count_model_macs(model, SHAPE)
    for param in model.parameters():
        nn.init.normal_(param)

    assert count_model_macs(model.train(), SHAPE) == first
    assert all(module.training for module in model.modules())
    assert [name for name, _ in model.named_modules()] == children
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == own


def test_backbone_of_a_two_stage_detector_runs_once():
    """Boxes and masks are counted apart; at detection sizes each pass takes seconds."""
    model = two_stage(cascade=False, masks=True, proposals=3, detections=2)
    calls = []
    model.backbone.register_forward_hook(lambda *args: calls.append(1))

    count_model_macs(model, SHAPE)

    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(64,), (64, 0), (64.5, 64)])
def test_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"size \(64.*: give .* two positive integers"):
        count_model_macs(nn.Conv2d(3, 4, 1), shape)
