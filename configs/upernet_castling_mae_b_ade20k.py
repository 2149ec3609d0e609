# UPerNet on ADE20K with mmpretrain's ViT-B/16, castled, from MAE's weights: the heads
# and crops of upernet_castling_s_ade20k.py.
#
#   python tools/train.py configs/upernet_castling_mae_b_ade20k.py
#
# Training begins by downloading mmpretrain's MAE of 1,600 epochs (450 MB).
#
# Schedule, as mmseg trains MAE's ViT-B, of 8 GPUs with 2 images each:
#   learning rate  1e-4 for 16 images, 1,500 iterations of warm-up, then linearly to 0
#   layer decay    0.65 of the layer above: 0.65^13 = 0.4% at the stem
#   weight decay   0.05
_base_ = ["./upernet_castling_s_ade20k.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmcastling.Castled",
        backbone=dict(
            type="mmpretrain.VisionTransformer",
            arch="base",
            img_size=(512, 512),
            patch_size=16,
            out_type="featmap",
            drop_path_rate=0.1,
            init_cfg=dict(
                type="Pretrained",
                checkpoint="https://mmassets.onedl.ai/mmselfsup/1.x/mae/"
                "mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k/"
                "mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k_20220825-f7569ca2.pth",
                prefix="backbone.",
            ),
        ),
        attention=dict(type="castling"),  # its form for trained weights
    ),
    neck=dict(in_channels=768),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    constructor="mmcastling.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(
        _delete_=True,
        layer_decay_rate=0.65,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
    ),
)

# MAE's attention is sharper than uniform: pairs above four times that survive at first.
# The masks fall to zero over the first 70% of training.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="4/N", end=1.0, finish=0.7)
]
