# Mask2Former on ADE20K with Castling-ViT-B/16, initialised from MAE as in the paper.
#
#   python tools/model_converters/import_vit.py mae_pretrain_vit_base.pth \
#       weights/mae_vit_base_512.pth --arch base --img-size 512
#   python tools/train.py configs/mask2former_castling_b_ade20k.py
#
# mae_pretrain_vit_base.pth is MAE's own release; docs/pretrained.md lists what else the
# importer reads. From scratch: model.backbone.init_cfg=None with --cfg-options.
#
# Head, data and schedule are mmseg's of 8 GPUs with 2 images each:
#   images       160,000 * 16 = 2,560,000, 126.7 passes over the 20,210 of training
#   optimizer    AdamW, 1e-4 for 16 images, weight decay 0.05, gradients clipped at 0.01
#   decay        polynomial of power 0.9, no warm-up
#   validation   every 5,000 iterations, 4 passes
# mmseg gives a backbone a tenth of the learning rate. Here each layer has 0.7 of that
# of the layer above, ViTDet's rate for ViT-B: over 12 blocks the stem is left 0.7^13,
# 1%, the sixth block 0.7^7, 8%.
_base_ = ["mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py"]

# mmcastling first: the pixel decoder's deformable attention needs mmcv's ops, and it
# brings them where mmcv has none compiled.
custom_imports = dict(
    _delete_=True, imports=["mmcastling", "mmdet.models"], allow_failed_imports=False
)

crop_size = (512, 512)
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmcastling.CastlingViT",
        arch="base",
        img_size=crop_size,
        patch_size=16,
        with_cls_token=False,
        out_type="featmap",
        drop_path_rate=0.1,
        # On the grid of tokens rather than along their line: what short trainings said
        # of it is at the end of docs/study.md.
        attention=dict(type="castling", local_conv="grid"),
        init_cfg=dict(
            type="Pretrained",
            checkpoint="weights/mae_vit_base_512.pth",
            prefix="backbone.",
        ),
    ),
    neck=dict(
        type="mmcastling.SimpleFeaturePyramid",
        in_channels=768,
        out_channels=256,
        in_stride=16,
        strides=(4, 8, 16, 32),
        num_extra_levels=0,
    ),
    decode_head=dict(in_channels=[256, 256, 256, 256]),
)

embeddings = dict(decay_mult=0.0)
optim_wrapper = dict(
    constructor="mmcastling.LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(
        _delete_=True,
        layer_decay_rate=0.7,
        norm_decay_mult=0.0,
        custom_keys={
            "query_embed": embeddings,
            "query_feat": embeddings,
            "level_embed": embeddings,
        },
    ),
)

# MAE's attention is sharper than uniform: pairs above four times that survive at first.
# The masks fall to zero over the first 70% of training.
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="4/N", end=1.0, finish=0.7)
]
# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    checkpoint=dict(type="AtomicCheckpointHook", max_keep_ckpts=2),
    exact_resume=dict(type="ExactResumeHook"),
)
