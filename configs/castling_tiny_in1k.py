# Castling-DeiT-T on ImageNet-1k with DeiT's recipe.
#
#   300 epochs of 1,281,167 images in batches of 8 GPUs x 128 = 1,024
#   learning rate 5e-4 * 1024 / 512 = 1e-3, cosine to 1e-5 after 20 epochs of warm-up
#
# ffn_conv=5 is the depthwise convolution in every MLP with which the cost matches the
# published 1.18 GMACs (inferred by arithmetic, no code of this variant is public).
_base_ = [
    "mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py",
    "mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py",
    "mmpretrain::_base_/default_runtime.py",
]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

data_root = "data/imagenet"

model = dict(
    type="ImageClassifier",
    backbone=dict(
        type="mmcastling.CastlingViT",
        arch="tiny",
        img_size=224,
        patch_size=16,
        ffn_conv=5,
        # 0.02 is the released threshold, about 4 times uniform attention at 197 tokens.
        attention=dict(type="castling", local_conv="token", mask_threshold=0.02),
    ),
    neck=None,
    head=dict(
        type="VisionTransformerClsHead",
        num_classes=1000,
        in_channels=192,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
    init_cfg=[
        dict(type="TruncNormal", layer="Linear", std=0.02),
        dict(type="Constant", layer="LayerNorm", val=1.0, bias=0.0),
    ],
    train_cfg=dict(
        augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]
    ),
)

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            ".cls_token": dict(decay_mult=0.0),
            ".pos_embed": dict(decay_mult=0.0),
        },
    ),
    clip_grad=dict(max_norm=5.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=1024)

custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start=0.02, end=1.0, finish=0.7)
]
# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    checkpoint=dict(type="AtomicCheckpointHook"),
    exact_resume=dict(type="ExactResumeHook"),
)
