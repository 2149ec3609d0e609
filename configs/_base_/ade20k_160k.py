# ADE20K at 512x512 for 160,000 iterations on 8 GPUs with 2 images each: the schedule of
# mmseg's transformers.
#
#   images       160,000 * 8 * 2 = 2,560,000, 126.7 passes over the 20,210 of training
#   warm-up      1,500 iterations, 24,000 images
#   decay        linear (a polynomial of power 1) from there to 0 at 160,000
#   validation   every 16,000 iterations, 12.7 passes
# AdamW with 6e-5 and a weight decay of 0.01 for 16 images is what Swin-T and DeiT-S
# take with UPerNet there; no decay on norms and position embeddings.
_base_ = [
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

train_dataloader = dict(batch_size=2)

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, custom_keys={"pos_embed": dict(decay_mult=0.0)}
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(
        type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160_000
    ),
]
# 8 GPUs x 2 images; enable=True comes from --auto-scale-lr.
auto_scale_lr = dict(enable=False, base_batch_size=16)

# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    checkpoint=dict(type="AtomicCheckpointHook", max_keep_ckpts=2),
    exact_resume=dict(type="ExactResumeHook"),
)
