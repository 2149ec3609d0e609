# Semantic FPN on ADE20K with Castling-MViTv2-T: upernet_castling_mvit_t_ade20k.py with
# a lighter head, behind an FPN.
_base_ = ["./upernet_castling_mvit_t_ade20k.py"]

model = dict(
    neck=dict(
        type="FPN", in_channels=[96, 192, 384, 768], out_channels=256, num_outs=4
    ),
    decode_head=dict(
        _delete_=True,
        type="FPNHead",
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=None,
)
