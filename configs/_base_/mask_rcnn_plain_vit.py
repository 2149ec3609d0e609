# Mask R-CNN on a plain vision transformer: ViTDet's simple feature pyramid (Li et al.
# 2022, section 3) between the backbone and mmdet's standard heads, the ones that its
# Swin-T has. The config that inherits fills in the backbone.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

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
    ),
)
