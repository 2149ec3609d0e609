# Mask R-CNN on COCO 2017 with mmdet's Swin-T, castled, from Swin's ImageNet weights:
# mmdet's own config, in which every shifted window gets linear attention.
#
#   python tools/train.py configs/mask_rcnn_castling_swin_t_coco.py
#
# Training begins by downloading swin_tiny_patch4_window7_224.pth (110 MB). Any backbone
# is castled in this way: its config goes into type="mmcastling.Castled".
#
# Data and schedule are mmdet's "3x", of 8 GPUs with 2 images each:
#   epochs         36 of 117,266 images with annotations / 16 = 7,330 iterations
#   learning rate  1e-4 for 16 images, divided by 10 after epochs 27 and 33
#   warm-up        1,000 iterations
_base_ = ["mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmcastling.Castled",
        backbone={{_base_.model.backbone}},
        # In a window of 7x7 linear attention saves little: it is there to make larger
        # windows cheap. window_size=14 above resizes the tables of position biases,
        # which the auxiliary branch reads while it is on.
        # Its form for trained weights; with 8x8 landmarks such windows have softmax.
        attention=dict(type="castling", landmarks=4),
    ),
)

# Pairs above four times uniform attention survive at first, as suits pretrained
# weights. The masks fall to zero over the first 70%, epoch 25: the steps of the
# learning rate train what is deployed.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="4/N", end=1.0, finish=0.7)
]
# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    checkpoint=dict(type="AtomicCheckpointHook", max_keep_ckpts=2),
    exact_resume=dict(type="ExactResumeHook"),
)
