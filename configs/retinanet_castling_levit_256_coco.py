# RetinaNet on COCO 2017 with Castling-LeViT-256 and the 1x schedule.
#
#   python tools/train.py configs/retinanet_castling_levit_256_coco.py
#
# 8 GPUs x 2 images, 12 epochs of 117,266 annotated images / 16 = 7,329 iterations:
#   learning rate  1e-4 for AdamW, as mmdet has it for RetinaNet with PVT
#   warm-up        500 iterations
#   steps          divided by 10 after epochs 8 and 11
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmcastling.CastlingLeViT",
        arch="256",
        # LeViT begins at stride 16, RetinaNet's pyramid at 8: its first level is the
        # last but one map of the stem.
        out_stem=True,
        out_indices=(0, 1, 2),
        final_norm=True,
        attention=dict(type="castling", local_conv="token"),
        # The depthwise convolution with which the cost at 224x224 meets the published
        # 1.41 GMACs (inferred by arithmetic, no code of this variant is public).
        ffn_conv=5,
        # From scratch; batch norms see 2 images of thousands of tokens. To finetune use
        # init_cfg=dict(type='Pretrained', checkpoint=...) and norm_eval=True.
    ),
    # Strides 8, 16, 32, 64, and 128 by one more convolution.
    neck=dict(in_channels=[128, 256, 384, 512], start_level=0, num_outs=5),
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)

# The threshold starts at uniform attention (1/N): the released 0.02 is 84 times
# that at 4,200 tokens. The last 30% train exactly what is deployed.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="1/N", end=1.0, finish=0.7)
]
# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    checkpoint=dict(type="AtomicCheckpointHook"),
    exact_resume=dict(type="ExactResumeHook"),
)
