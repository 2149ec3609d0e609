# Cascade Mask R-CNN on COCO 2017 with Castling-ViT-S/16: mask_rcnn_castling_s_coco.py,
# data and schedule included, with the box head three times. Each works on the boxes of
# the one before at a higher overlap (Cai and Vasconcelos 2018; mmdet's settings).
_base_ = ["./mask_rcnn_castling_s_coco.py"]

spread = (0.1, 0.1, 0.2, 0.2)  # of box offsets at the first head
stages = [dict(overlap=0.5, scale=1), dict(overlap=0.6, scale=2)]
stages += [dict(overlap=0.7, scale=3)]
box_head = _base_.model.roi_head.bbox_head
proposals = _base_.model.train_cfg.rcnn

model = dict(
    type="CascadeRCNN",
    roi_head=dict(
        type="CascadeRoIHead",
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                box_head,
                reg_class_agnostic=True,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder",
                    target_means=[0.0] * 4,
                    target_stds=[round(std / stage["scale"], 3) for std in spread],
                ),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for stage in stages
        ],
    ),
    train_cfg=dict(
        rcnn=[
            dict(
                proposals,
                assigner=dict(
                    type="MaxIoUAssigner",
                    pos_iou_thr=stage["overlap"],
                    neg_iou_thr=stage["overlap"],
                    min_pos_iou=stage["overlap"],
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
            )
            for stage in stages
        ]
    ),
)
