# Mask R-CNN on COCO 2017 with Castling-MViTv2-S: the data and schedule of
# mask_rcnn_castling_mvit_t_coco.py with 16 blocks for 10. MViTv2's own detectors keep
# the stochastic depth of T for S.
_base_ = ["./mask_rcnn_castling_mvit_t_coco.py"]

model = dict(backbone=dict(arch="small"))
