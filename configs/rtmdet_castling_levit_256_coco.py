# RTMDet on COCO 2017 with Castling-LeViT-256; neck and head of RTMDet-S's width.
_base_ = ["./_base_/rtmdet_castling_levit.py"]

model = dict(
    backbone=dict(arch="256"),
    neck=dict(in_channels=[128, 256, 384, 512], out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128),
)
