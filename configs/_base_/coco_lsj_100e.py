# COCO 2017 with large-scale jitter at 1024x1024 for 100 epochs: the ViTDet recipe for
# 8 GPUs with 2 images each.
#
# ViTDet trains 184,375 iterations of 64 images; we have 8 x 2 = 16, a quarter:
#   learning rate  1e-4 * 16 / 64 = 2.5e-5 (linear rule, as --auto-scale-lr applies it)
#   warm-up        250 iterations of 64 = 16,000 images = 1,000 iterations of 16
#   iterations     100 epochs * 117,266 images with annotations / 16 = 732,913
#   steps          ViTDet divides by 10 after 163,889 and 177,546 of 184,375 iterations,
#                  88.9% and 96.3%: 651,479 and 705,767 of 732,913
#   validation     every 36,646 iterations, 5 epochs
_base_ = ["mmdet::common/lsj-100e_coco-instance.py"]

image_size = (1024, 1024)
# Jitter may leave a crop smaller than that: what inherits pads it in its preprocessor,
# so that shapes are constant.
batch_augments = [dict(type="BatchFixedSizePad", size=image_size, pad_mask=True)]

test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="Resize", scale=image_size, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=2,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        _delete_=True,  # mmdet repeats the set per epoch; iterations need no epochs
        type="CocoDataset",
        data_root="data/coco/",
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline={{_base_.train_pipeline}},
    ),
)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 732_913
val_interval = 36_646
train_cfg = dict(
    _delete_=True,
    type="IterBasedTrainLoop",
    max_iters=max_iters,
    val_interval=val_interval,
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(
        type="MultiStepLR",
        by_epoch=False,
        begin=0,
        end=max_iters,
        milestones=[651_479, 705_767],
        gamma=0.1,
    ),
]

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2.5e-5, betas=(0.9, 0.999), weight_decay=0.1),
    clip_grad=dict(max_norm=1.0),
)
# 8 GPUs x 2 images; enable=True comes from --auto-scale-lr.
auto_scale_lr = dict(enable=False, base_batch_size=16)

# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    checkpoint=dict(
        type="AtomicCheckpointHook",
        by_epoch=False,
        interval=val_interval,
        max_keep_ckpts=2,
    ),
    exact_resume=dict(type="ExactResumeHook"),
)
log_processor = dict(by_epoch=False)
