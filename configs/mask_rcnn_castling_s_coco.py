# Mask R-CNN on COCO 2017 with Castling-ViT-S/16 and ViTDet's pyramid and recipe.
#
#   python tools/train.py configs/mask_rcnn_castling_s_coco.py
#
# Every block is global: with linear attention the 4,096 tokens of a 1024x1024 image
# cost no more per token than 196 do, so ViTDet's windows are not needed.
_base_ = ["./_base_/mask_rcnn_plain_vit.py", "./_base_/coco_lsj_100e.py"]

model = dict(
    data_preprocessor=dict(batch_augments={{_base_.batch_augments}}),
    backbone=dict(
        arch="small",
        img_size=1024,
        patch_size=16,
        with_cls_token=False,
        out_type="featmap",
        drop_path_rate=0.1,
        # On the grid of tokens rather than along their line: what short trainings said
        # of it is at the end of docs/study.md.
        attention=dict(type="castling", local_conv="grid"),
        # From scratch; to finetune use init_cfg=dict(type='Pretrained',
        # checkpoint=...) with weights of mmpretrain's VisionTransformer.
        init_cfg=dict(type="TruncNormal", layer="Linear", std=0.02),
    ),
)

optim_wrapper = dict(
    # 0.8 per layer for 12 layers, as ViTDet's 0.7 for ViT-B and 0.8 for ViT-L suggest
    # for a network that is finetuned; it has not been searched for here.
    constructor="mmcastling.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0, bias_decay_mult=0.0),
)

# The masks fall to zero over the first 70% of training; the last 30%, lowered learning
# rates included, train exactly what is deployed. The threshold starts at uniform
# attention, which almost half of the pairs exceed at initialisation; the released 0.02
# is 82 times that at 4,096 tokens and leaves the branch empty. From pretrained weights,
# whose attention is sharper, a few times that (start='4/N') suits better.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="1/N", end=1.0, finish=0.7)
]
