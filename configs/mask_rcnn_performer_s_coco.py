# The Performer twin of mask_rcnn_castling_s_coco.py: the same network, data and
# schedule with positive random features, another attention that is linear in tokens.
_base_ = ["./mask_rcnn_softmax_s_coco.py"]

model = dict(backbone=dict(attention=dict(type="performer")))
