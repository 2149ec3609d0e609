# Mask R-CNN on a plain vision transformer, with ViTDet's neck and heads (Li et al.
# 2022, section 3): layer norms, two RPN convolutions, a box head of four convolutions
# and one linear layer. The config that inherits fills in the backbone.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

norm_cfg = dict(type="mmcastling.ChannelLayerNorm", eps=1e-6)
model = dict(
    backbone=dict(_delete_=True, type="mmcastling.CastlingViT"),
    neck=dict(
        _delete_=True,
        type="mmcastling.SimpleFeaturePyramid",
        in_channels=384,
        out_channels=256,
        in_stride=16,
        strides=(4, 8, 16, 32),
        num_extra_levels=1,
        norm_cfg=norm_cfg,
    ),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg
        ),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
