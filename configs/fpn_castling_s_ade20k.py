# Semantic FPN on ADE20K with Castling-ViT-S/16: upernet_castling_s_ade20k.py with a
# lighter head, in which the simple feature pyramid stands in for the FPN.
_base_ = ["./upernet_castling_s_ade20k.py"]

model = dict(
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
