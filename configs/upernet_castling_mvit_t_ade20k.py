# UPerNet on ADE20K with Castling-MViTv2-T, on its own four scales.
#
#   python tools/train.py configs/upernet_castling_mvit_t_ade20k.py
#
# A crop of 512x512 has 16,384, 4,096, 1,024 and 256 tokens on the four scales; a block
# that subsamples attends on the scale that it leaves. The branch looks at all pairs in
# 1 + 2, 2 + 4, 4 * 4 + 8 and 8 heads:
#   8.1e8, 1.0e8, 0.25e8 and 0.005e8 of them.
# The two blocks of the first scale would take 86% of that: they train as they are
# deployed.
_base_ = ["mmseg::_base_/models/upernet_r50.py", "./_base_/ade20k_160k.py"]

without_branch = dict(type="linear_angular", local_conv="token")
with_branch = dict(type="castling", local_conv="token")

crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="mmcastling.CastlingMViT",
        arch="tiny",
        img_size=crop_size,
        out_indices=(0, 1, 2, 3),
        attention=[without_branch, with_branch, with_branch, with_branch],
        # The depthwise convolution with which the cost at 224x224 meets the published
        # 4.51 GMACs (inferred by arithmetic, no code of this variant is public).
        ffn_conv=5,
        drop_path_rate=0.2,
        # From scratch; to finetune use init_cfg=dict(type='Pretrained',
        # checkpoint=...) with weights that tools/model_converters/import_mvit.py has
        # written.
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    # On the map of stride 16.
    auxiliary_head=dict(in_channels=384, in_index=2, num_classes=150),
)

# Masks as with the plain transformer: see upernet_castling_s_ade20k.py.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="1/N", end=1.0, finish=0.7)
]
