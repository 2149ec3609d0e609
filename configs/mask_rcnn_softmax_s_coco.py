# The softmax twin of mask_rcnn_castling_s_coco.py: the same network, data and schedule
# with the attention that castling replaces. All blocks are global here too.
_base_ = ["./mask_rcnn_castling_s_coco.py"]

model = dict(backbone=dict(attention=dict(_delete_=True, type="softmax")))
custom_hooks = []
