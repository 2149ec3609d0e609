# COCO 2017 with large-scale jitter at 1024x1024 for 100 epochs: the ViTDet recipe for
# 8 GPUs with 2 images each.
#
# ViTDet trains with 64 images per iteration, we with 8 x 2 = 16, a quarter:
#   learning rate   1e-4 * 16 / 64 = 2.5e-5 (linear rule, as --auto-scale-lr applies it)
#   warm-up         250 iterations of 64 = 16,000 images = 1,000 iterations of 16
#   epochs          117,266 images with annotations / 16 = 7,330 iterations; one epoch
#                   here repeats the set 4 times, so 25 of them are 100 epochs, 732,950
#                   iterations
#   steps           ViTDet divides by 10 at 163,889 and 177,546 of 184,375 iterations,
#                   88.9% and 96.3%: at 0.889 * 25 = 22.2 and 0.963 * 25 = 24.1 epochs
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
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

max_epochs = 25
iters_per_epoch = 4 * 7330
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=1000),
    dict(
        type="MultiStepLR",
        by_epoch=False,
        begin=0,
        end=max_epochs * iters_per_epoch,  # 733,000
        milestones=[651_637, 705_879],  # 88.9% and 96.3% of it
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
