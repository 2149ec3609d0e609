"""One constructor of layer-wise decay for three families in three toolboxes."""

import copy

import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmcastling  # noqa: F401  (makes mmdet importable without compiled mmcv ops)

RATE, LR = 0.5, 8e-3

# Each with its number of layers, stem and output included, and the layer of parameters.
FAMILIES = {
    "vit": (
        dict(
            type="mmcastling.CastlingViT",
            arch=dict(
                embed_dims=16, num_layers=3, num_heads=2, feedforward_channels=32
            ),
            img_size=64,
            stem="conv",
            with_cls_token=False,
            out_type="featmap",
            out_indices=(1, 2),
            ffn_conv=3,
        ),
        (16, 16),
        5,
        {
            "pos_embed": 0,
            "patch_embed.layers.0.weight": 0,
            "layers.0.attn.qkv.weight": 1,
            "layers.0.attn.mixer.local_conv.weight": 1,
            "layers.1.ffn.dwconv.weight": 2,
            "layers.2.ln2.bias": 3,
            "out_norm1.weight": 4,
            "ln1.weight": 4,
        },
    ),
    "levit": (
        dict(
            type="mmcastling.CastlingLeViT",
            arch=dict(
                embed_dims=[16, 24, 32],
                key_dims=[4, 4, 4],
                num_heads=[2, 3, 4],
                depths=[2, 1, 1],
            ),
            out_indices=(1, 2),
            out_stem=True,
            final_norm=True,
            ffn_conv=3,
        ),
        (8, 24, 32),
        8,
        {
            "patch_embed.patch_embed.0.conv.weight": 0,
            "stages.0.0.block.qkv.linear.weight": 1,
            "stages.0.1.block.linear1.linear.weight": 1,
            "stages.0.2.block.mixer.local_conv.weight": 2,
            "stages.0.3.block.dwconv.weight": 2,
            "stages.1.0.qkv.linear.weight": 3,  # between two stages
            "stages.1.1.block.linear2.bn.bias": 3,
            "stages.1.2.block.proj.1.linear.weight": 4,
            "stages.2.0.proj.1.linear.weight": 5,
            "stages.2.3.block.linear1.linear.weight": 6,
            "norm1.weight": 7,
            "norm2.bias": 7,
            "norm_stem.weight": 7,
        },
    ),
    "mvit": (
        dict(
            type="mmcastling.CastlingMViT",
            arch=dict(embed_dims=8, num_layers=3, num_heads=1, downscale_indices=[1]),
            out_indices=(0, 1),
            use_abs_pos_embed=True,
            ffn_conv=3,
        ),
        (8, 16),
        5,
        {
            "pos_embed": 0,
            "patch_embed.projection.bias": 0,
            "blocks.0.attn.qkv.weight": 1,
            "blocks.1.attn.pool_out.weight": 2,
            "blocks.2.mlp.dwconv.weight": 3,
            "norm0.weight": 4,
            "norm1.bias": 4,
        },
    ),
}


def classifier(backbone, widths):
    return dict(
        type="ImageClassifier",
        backbone=backbone,
        neck=dict(type="GlobalAveragePooling"),
        head=dict(type="LinearClsHead", num_classes=5, in_channels=widths[-1]),
    )


def detector(backbone, widths):
    import mmdet.models  # noqa: F401

    return dict(
        type="RetinaNet",
        backbone=backbone,
        neck=dict(type="FPN", in_channels=list(widths), out_channels=8, num_outs=3),
        bbox_head=dict(
            type="RetinaHead",
            num_classes=3,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            anchor_generator=dict(
                type="AnchorGenerator", scales=[8], ratios=[1.0], strides=[8, 16, 32]
            ),
        ),
        train_cfg=dict(
            assigner=dict(
                type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
            )
        ),
    )


def segmentor(backbone, widths):
    import mmseg.models  # noqa: F401

    return dict(
        type="EncoderDecoder",
        backbone=backbone,
        decode_head=dict(
            type="FCNHead",
            in_channels=widths[-1],
            channels=8,
            num_classes=3,
            num_convs=1,
            in_index=-1,
        ),
    )


TOOLBOXES = {"mmpretrain": classifier, "mmdet": detector, "mmseg": segmentor}


def groups_by_name(model, **paramwise):
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type="AdamW", lr=LR, weight_decay=0.1),
            constructor="mmcastling.LayerDecayOptimWrapperConstructor",
            paramwise_cfg=dict(layer_decay_rate=RATE, **paramwise),
        ),
    )
    return {
        name: group
        for group in wrapper.optimizer.param_groups
        for name in group["param_names"]
    }


@pytest.mark.parametrize("toolbox", TOOLBOXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_rate(family, toolbox):
    backbone, widths, num_layers, layers = FAMILIES[family]
    with DefaultScope.overwrite_default_scope(toolbox):
        cfg = TOOLBOXES[toolbox](copy.deepcopy(backbone), widths)
        model = MODELS.build(cfg)
    found = groups_by_name(model, norm_decay_mult=0.0)

    assert found.keys() == dict(model.named_parameters()).keys()
    for name, layer in layers.items():
        scale = RATE ** (num_layers - 1 - layer)
        group = found[f"backbone.{name}"]
        assert group["lr_scale"] == pytest.approx(scale), name
        assert group["lr"] == pytest.approx(LR * scale), name
    inside = {g["lr_scale"] for n, g in found.items() if n.startswith("backbone.")}
    assert inside == {RATE**i for i in range(num_layers)}
    outside = [g for n, g in found.items() if not n.startswith("backbone.")]
    assert outside and all(group["lr"] == LR for group in outside)
    free = {n for n, g in found.items() if g["weight_decay"] == 0}
    assert ("backbone.pos_embed" in free) == (family != "levit")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_numbered_in_the_order_of_the_forward(family):
    """And the convention of mmpretrain: what is outside counts as the last layer."""
    backbone, _, num_layers, _ = FAMILIES[family]
    model = MODELS.build(copy.deepcopy(backbone))
    depths = [
        model.get_layer_depth(name)
        for name, _ in model.named_parameters()
        if "norm" not in name.split(".")[0] and not name.startswith("ln")
    ]
    assert {count for _, count in depths} == {num_layers}
    assert [depth for depth, _ in depths] == sorted(depth for depth, _ in depths)
    assert {depth for depth, _ in depths} == set(range(num_layers - 1))
    prefixed = model.get_layer_depth("m.backbone.norm1.weight", "m.backbone.")
    outside = model.get_layer_depth("head.weight", "m.backbone.")
    assert prefixed == outside == (num_layers - 1, num_layers)


class Sharded(nn.Module):
    """Stands for FSDP around a part of the model, which needs a process group."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._fsdp_wrapped_module, name)


def test_parts_that_are_sharded_keep_their_layers():
    backbone, widths, num_layers, layers = FAMILIES["vit"]
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(classifier(copy.deepcopy(backbone), widths))
    model.backbone.layers[1] = Sharded(model.backbone.layers[1])
    model.backbone = Sharded(model.backbone)
    found = groups_by_name(model)
    for name, layer in layers.items():
        scale = RATE ** (num_layers - 1 - layer)
        assert found[f"backbone.{name}"]["lr_scale"] == pytest.approx(scale), name
