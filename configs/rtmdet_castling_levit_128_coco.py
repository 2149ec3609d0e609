# RTMDet on COCO 2017 with Castling-LeViT-128; neck and head of RTMDet-tiny's width.
_base_ = ["./_base_/rtmdet_castling_levit.py"]

model = dict(
    backbone=dict(arch="128"),
    neck=dict(in_channels=[64, 128, 256, 384]),
)
