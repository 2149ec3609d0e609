# Mask R-CNN on COCO 2017 with Castling-ViT-B/16: mask_rcnn_castling_s_coco.py, data and
# schedule included, with ViTDet's layer decay of 0.7 for ViT-B and its heads (Li et al.
# 2022, section 3): layer norms, two RPN convolutions, a box head of four convolutions
# and one linear layer. Over 1,000 proposals those four cost 116 GMACs, a third of what
# ViT-B costs at 1024x1024 and more than all of ViT-S: hence here and not there.
_base_ = ["./mask_rcnn_castling_s_coco.py"]

norm_cfg = dict(type="mmcastling.ChannelLayerNorm", eps=1e-6)

model = dict(
    backbone=dict(arch="base"),
    neck=dict(in_channels=768),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg
        ),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
