# RTMDet on COCO 2017 with Castling-LeViT-192; neck and head of RTMDet-tiny's width.
_base_ = ["./_base_/rtmdet_castling_levit.py"]

model = dict(
    backbone=dict(arch="192"),
    neck=dict(in_channels=[96, 192, 288, 384]),
)
