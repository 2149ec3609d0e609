# The local-attention twin of mask_rcnn_castling_s_coco.py: mmdet's Swin-T with FPN, its
# own decay settings, and the same data, batch and schedule.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "./_base_/coco_lsj_100e.py",
]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(batch_augments={{_base_.batch_augments}}),
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        mlp_ratio=4,
        qkv_bias=True,
        drop_path_rate=0.2,
        patch_norm=True,
        out_indices=(0, 1, 2, 3),
        # From scratch like its twins; add init_cfg=dict(type='Pretrained', ...) and
        # convert_weights=True to finetune.
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "absolute_pos_embed": dict(decay_mult=0.0),
            "relative_position_bias_table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    )
)
