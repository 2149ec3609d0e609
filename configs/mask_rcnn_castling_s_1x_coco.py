# The 1x schedule: 12 epochs of COCO 2017 at the same 1024x1024 jitter.
#
#   12 epochs * 117,266 images / 16 = 87,950 iterations
#   steps after epochs 8 and 11: 58,633 and 80,620; validation every epoch, 7,329
_base_ = ["./mask_rcnn_castling_s_coco.py"]

max_iters = 87_950
train_cfg = dict(max_iters=max_iters, val_interval=7_329)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(
        type="MultiStepLR",
        by_epoch=False,
        begin=0,
        end=max_iters,
        milestones=[58_633, 80_620],
        gamma=0.1,
    ),
]
default_hooks = dict(checkpoint=dict(interval=7_329))
