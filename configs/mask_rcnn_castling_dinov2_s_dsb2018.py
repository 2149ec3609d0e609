# Mask R-CNN with a castled and aligned DINOv2-S on the nuclei of the Data Science Bowl
# 2018, finetuned on a CPU in less than an hour of one core.
#
#   python tools/data/fetch_dinov2_s.py data/dinov2_s
#   python benchmarks/align_dinov2.py data/dinov2_s PHOTOS --rows all
#   python benchmarks/dinov2_finetuned.py dsb2018 data/dinov2_s
#
# Or with a checkpoint of your own: --cfg-options load_from=BACKBONE.pth
_base_ = ["./mask_rcnn_castling_nano_dsb2018.py"]

# 24x24 = 576 tokens in training; a whole square micrograph has 36x36 = 1,296.
crop_size = (336, 336)
frame = (1008, 504)

model = dict(
    # Mean and deviation of ImageNet, which DINOv2 was trained with.
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], pad_size_divisor=28
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
    neck=dict(in_channels=384, in_stride=14, strides=(3.5, 7, 14)),
    rpn_head=dict(anchor_generator=dict(scales=[4], strides=[3.5, 7, 14])),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=[3.5, 7]),
        mask_roi_extractor=dict(featmap_strides=[3.5, 7]),
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=frame, ratio_range=(0.7, 1.4), keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute", crop_size=crop_size),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4)),
    dict(
        type="RandomFlip",
        prob=[0.25, 0.25, 0.25],
        direction=["horizontal", "vertical", "diagonal"],
    ),
    dict(type="PhotoMetricDistortion", hue_delta=9),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=frame, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# 600 iterations of 2 crops = 1,200 crops, three from each of the 425 micrographs.
max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=200)
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
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
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR",
        by_epoch=False,
        begin=50,
        end=max_iters,
        T_max=max_iters - 50,
        eta_min=1e-6,
    ),
]
custom_hooks = []
