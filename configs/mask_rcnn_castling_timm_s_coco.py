# Mask R-CNN on COCO 2017 with a vision transformer of timm, castled: DeiT III-S/16 with
# the pyramid, data and schedule of mask_rcnn_castling_s_coco.py.
#
#   python tools/train.py configs/mask_rcnn_castling_timm_s_coco.py
#
# timm downloads the ImageNet weights (88 MB) when the model is built; from scratch, or
# with weights in a file: model.backbone.backbone.pretrained=False, and
# model.backbone.backbone.checkpoint_path=FILE. Needs timm.
_base_ = ["./mask_rcnn_castling_s_coco.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmcastling.Castled",
        backbone=dict(
            type="mmpretrain.TIMMBackbone",
            model_name="deit3_small_patch16_224",
            pretrained=True,
            # One map of stride 16, of the last block.
            features_only=True,
            out_indices=[11],
            img_size=1024,
            dynamic_img_size=True,
            drop_path_rate=0.1,
        ),
        attention=dict(type="castling"),  # its form for trained weights
    ),
)

# From pretrained weights, whose attention is sharper, masks start at "4/N".
custom_hooks = [
    dict(type="MaskDecayHook", mode="threshold", start="4/N", end=1.0, finish=0.7)
]
