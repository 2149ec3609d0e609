# UPerNet on ADE20K with Castling-ViT-S/16 and a simple feature pyramid.
#
#   python tools/train.py configs/upernet_castling_s_ade20k.py
#
# Every block is global. A crop of 512x512 has 1,024 tokens, in training as in testing,
# where a window of that size slides over the image by two thirds of itself (341).
_base_ = ["mmseg::_base_/models/upernet_r50.py", "./_base_/ade20k_160k.py"]

crop_size = (512, 512)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type="mmcastling.CastlingViT",
        arch="small",
        img_size=crop_size,
        patch_size=16,
        with_cls_token=False,
        out_type="featmap",
        drop_path_rate=0.1,
        # On the grid of tokens rather than along their line: what short trainings said
        # of it is at the end of docs/study.md.
        attention=dict(type="castling", local_conv="grid"),
        # From scratch; to finetune use init_cfg=dict(type='Pretrained',
        # checkpoint=...) with weights that tools/model_converters/import_vit.py has
        # written (--img-size 512).
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
    ),
    # Strides 4 to 32 from the one map of stride 16.
    neck=dict(
        type="mmcastling.SimpleFeaturePyramid",
        in_channels=384,
        out_channels=256,
        in_stride=16,
        strides=(4, 8, 16, 32),
        num_extra_levels=0,
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256], num_classes=150),
    # On the map of stride 16.
    auxiliary_head=dict(in_channels=256, in_index=2, num_classes=150),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341)),
)

# The masks fall to zero over the first 70% of training; the rest trains exactly what is
# deployed. Almost half of the pairs exceed uniform attention at initialisation; from
# pretrained weights, whose attention is sharper, start='4/N' suits better.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="1/N", end=1.0, finish=0.7)
]
