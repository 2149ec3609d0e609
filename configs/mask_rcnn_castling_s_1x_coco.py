# The 1x schedule: 12 epochs of COCO 2017 at the same 1024x1024 jitter.
#
#   12 epochs = 3 passes over the set repeated 4 times = 3 * 29,320 = 87,960 iterations
#   steps at epochs 8 and 11 of 12 = 58,640 and 80,630 iterations
_base_ = ["./mask_rcnn_castling_s_coco.py"]

max_epochs = 3
train_cfg = dict(max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(
        type="MultiStepLR",
        by_epoch=False,
        begin=0,
        end=87_960,
        milestones=[58_640, 80_630],
        gamma=0.1,
    ),
]
