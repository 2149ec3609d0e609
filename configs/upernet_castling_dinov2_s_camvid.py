# UPerNet with a castled and aligned DINOv2-S on CamVid's road scenes, finetuned on a
# CPU in less than an hour of one core.
#
#   python tools/data/fetch_dinov2_s.py data/dinov2_s
#   python benchmarks/align_dinov2.py data/dinov2_s PHOTOS --rows all
#   python benchmarks/dinov2_finetuned.py camvid data/dinov2_s
#
# Or with a checkpoint of your own: --cfg-options load_from=BACKBONE.pth
_base_ = ["./upernet_castling_nano_camvid.py"]

# 18x24 = 432 tokens, in training and of each of the nine crops that a frame is cut into
# in testing. A whole frame, enlarged 1.4 times, has 36x48 = 1,728: docs/align.md has
# mIoU of both.
crop_size = (252, 336)
frame = (672, 504)
void = 11

model = dict(
    # Mean and deviation of ImageNet, which DINOv2 was trained with.
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], size=crop_size
    ),
    backbone=dict(
        _delete_=True,
        type="mmcastling.CastlingViT",
        arch="small",
        img_size=518,
        patch_size=14,
        layer_scale_init_value=1e-5,
        out_type="featmap",
        # The form for trained weights, see docs/align.md; the branch is off.
        attention=dict(
            type="castling",
            form="landmarks",
            local_conv=dict(type="grid", kernel_size=3, init="zero"),
            mask_threshold=1.0,
        ),
    ),
    neck=dict(in_channels=384, out_channels=96, in_stride=14, strides=(7, 14, 28)),
    decode_head=dict(
        in_channels=[96, 96, 96], in_index=[0, 1, 2], channels=96, pool_scales=(1, 2, 3)
    ),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(126, 168)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=frame, ratio_range=(0.6, 1.2), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75, ignore_index=void),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=frame, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# 600 iterations of 4 crops = 2,400 crops, 20 from each of the 123 frames.
max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=300)
optim_wrapper = dict(
    # With softmax, a backbone at 1e-4 was behind a frozen one after 80 iterations, at
    # 2e-5 ahead of it.
    optimizer=dict(lr=2e-3),
    # Trained weights learn at a hundredth of the rate of the head, what castling added
    # at 30 times that, as in an alignment.
    paramwise_cfg=dict(
        custom_keys={
            "backbone": dict(lr_mult=0.01),
            "backbone.pos_embed": dict(lr_mult=0.01, decay_mult=0.0),
            "attn.mixer": dict(lr_mult=0.3),
        }
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=40),
    dict(
        type="CosineAnnealingLR",
        by_epoch=False,
        begin=40,
        end=max_iters,
        T_max=max_iters - 40,
        eta_min=1e-6,
    ),
]
custom_hooks = []
