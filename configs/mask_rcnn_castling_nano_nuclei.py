# The demo: Mask R-CNN with Castling-ViT-nano on the embedded nuclei, from scratch on a
# CPU in minutes.
#
#   python tools/data/prepare_nuclei.py
#   python tools/train.py configs/mask_rcnn_castling_nano_nuclei.py
#
# Objects are 10 to 30 pixels across, so everything is finer than on COCO: tokens of
# stride 8, pyramid levels of stride 4 to 16, one anchor of 4 strides, enlarged images.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(
        # Stain and scanner dominate: statistics of the training region, not ImageNet's.
        mean=[171.6, 124.7, 188.5],
        std=[58.1, 65.5, 37.3],
        pad_size_divisor=16,
    ),
    backbone=dict(
        _delete_=True,
        type="mmcastling.CastlingViT",
        arch="nano",
        img_size=256,  # 32x32 = 1,024 tokens in training, 4,096 in testing
        patch_size=8,
        stem="conv",
        with_cls_token=False,
        out_type="featmap",
        # On the grid, without reference_tokens: the end of docs/study.md.
        attention=dict(type="castling", local_conv="grid", mask_threshold="1/N"),
    ),
    neck=dict(
        _delete_=True,
        type="mmcastling.SimpleFeaturePyramid",
        in_channels=128,
        out_channels=64,
        in_stride=8,
        strides=(4, 8, 16),
        num_extra_levels=0,
    ),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64, featmap_strides=[4, 8], finest_scale=28
        ),
        bbox_head=dict(
            in_channels=64, fc_out_channels=256, num_classes=1, reg_class_agnostic=True
        ),
        mask_roi_extractor=dict(
            out_channels=64, featmap_strides=[4, 8], finest_scale=28
        ),
        mask_head=dict(
            num_convs=2, in_channels=64, conv_out_channels=64, num_classes=1
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    # A tile holds up to a hundred nuclei.
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=500), rcnn=dict(max_per_img=150)),
)

dataset_type = "CocoDataset"
data_root = "data/nuclei/"
metainfo = dict(classes=("nucleus",), palette=[(220, 20, 60)])

# Tiles are 250x250. Training crops 112 to 144 pixels and enlarges them to 256, about
# two times; testing enlarges whole tiles to 512, as much.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(112, 144)),
    dict(type="Resize", scale=(256, 256), keep_ratio=False),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4)),
    dict(
        type="RandomFlip",
        prob=[0.25, 0.25, 0.25],
        direction=["horizontal", "vertical", "diagonal"],
    ),
    dict(
        type="PhotoMetricDistortion",
        brightness_delta=16,
        contrast_range=(0.8, 1.2),
        saturation_range=(0.8, 1.2),
        hue_delta=6,
    ),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 512), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]

train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    type="CocoMetric",
    ann_file=data_root + "annotations/instances_val.json",
    metric=["bbox", "segm"],
)
test_evaluator = val_evaluator

# 700 iterations of 2 crops = 1,400 crops, about nine from each of the 154 tiles.
max_iters = 700
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={"pos_embed": dict(decay_mult=0.0)},
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
        eta_min=1e-5,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=2)

# At first attention is close to uniform: almost half of the pairs exceed 1/N (measured
# 44 to 48% per layer), none 4/N.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="1/N", end=1.0, finish=0.7)
]
# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        type="AtomicCheckpointHook", by_epoch=False, interval=100, max_keep_ckpts=1
    ),
    exact_resume=dict(type="ExactResumeHook"),
)
log_processor = dict(window_size=20, by_epoch=False)
randomness = dict(seed=0)
