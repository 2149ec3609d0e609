# Mask R-CNN on COCO 2017 with Castling-ViT-B/16: mask_rcnn_castling_s_coco.py, data and
# schedule included, with ViTDet's layer decay of 0.7 for ViT-B.
_base_ = ["./mask_rcnn_castling_s_coco.py"]

model = dict(backbone=dict(arch="base"), neck=dict(in_channels=768))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
