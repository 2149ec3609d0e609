# UPerNet with Castling-ViT-nano on CamVid's road scenes, from scratch on a CPU in about
# ten minutes.
#
#   python tools/train.py configs/upernet_castling_nano_camvid.py
#
# Any data in this layout, ids from 0, will do with its own classes, palette and void:
#   data/camvid/images/{train,val}/NAME.jpg         annotations/{train,val}/NAME.png
_base_ = [
    "mmseg::_base_/models/upernet_r50.py",
    "mmseg::_base_/default_runtime.py",
]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

classes = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence")
classes += ("car", "pedestrian", "bicyclist")
palette = [
    [128, 128, 128],
    [128, 0, 0],
    [192, 192, 128],
    [128, 64, 128],
    [60, 40, 222],
    [128, 128, 0],
    [192, 128, 128],
    [64, 64, 128],
    [64, 0, 128],
    [64, 64, 0],
    [0, 128, 192],
]
# Unlabelled pixels. The loss, the metric and what pads a crop must agree about it.
void = 11

# 24x32 = 768 tokens in training, 45x60 = 2,700 of a whole frame in testing: so that the
# sum over all of them does not outgrow a token's own share, it is scaled by 768 / N.
crop_size = (192, 256)

model = dict(
    data_preprocessor=dict(
        # Mean and deviation of the 123 training frames.
        mean=[104.9, 108.4, 110.2],
        std=[78.3, 79.4, 78.3],
        size=crop_size,
        seg_pad_val=void,
    ),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="mmcastling.CastlingViT",
        arch="nano",
        img_size=crop_size,
        patch_size=8,
        stem="conv",
        with_cls_token=False,
        out_type="featmap",
        attention=dict(
            type="castling",
            local_conv="grid",
            mask_threshold="1/N",
            # Frames have 3.5 times the tokens of the crops. Short trainings could not
            # tell what it does (docs/study.md).
            reference_tokens=768,
        ),
    ),
    neck=dict(
        type="mmcastling.SimpleFeaturePyramid",
        in_channels=128,
        out_channels=64,
        in_stride=8,
        strides=(4, 8, 16, 32),
        num_extra_levels=0,
    ),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        num_classes=len(classes),
        ignore_index=void,
        norm_cfg=dict(type="BN"),
        # sqrt(median share / share) of each class among the training pixels: a
        # bicyclist is on one pixel in 385, road on one in three.
        loss_decode=dict(
            class_weight=[0.5, 0.4, 2.1, 0.4, 1.0, 0.7, 2.0, 2.0, 0.9, 2.5, 4.1]
        ),
    ),
    auxiliary_head=None,
)

dataset_type = "BaseSegDataset"
data_root = "data/camvid/"
metainfo = dict(classes=classes, palette=palette)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        type="RandomResize", scale=(480, 360), ratio_range=(0.6, 1.2), keep_ratio=True
    ),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75, ignore_index=void),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(480, 360), keep_ratio=True),
    # The truth keeps its size: predictions are resized to it.
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path="images/train", seg_map_path="annotations/train"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path="images/val", seg_map_path="annotations/val"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], ignore_index=void)
test_evaluator = val_evaluator

# 540 iterations of 4 crops = 2,160 crops, 17 or 18 from each of the 123 frames.
max_iters = 540
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
auto_scale_lr = dict(enable=False, base_batch_size=4)

# Attention is close to uniform at first: about half of the pairs exceed 1/N. While the
# branch is on, a step takes twice its time, so it goes earlier than in other configs.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="1/N", end=1.0, finish=0.5)
]
# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="AtomicCheckpointHook", by_epoch=False, interval=100, max_keep_ckpts=1
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
    exact_resume=dict(type="ExactResumeHook"),
)
log_processor = dict(window_size=20, by_epoch=False)
randomness = dict(seed=0)
