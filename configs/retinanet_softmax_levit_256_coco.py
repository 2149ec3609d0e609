# The softmax twin of retinanet_castling_levit_256_coco.py: the published LeViT-256,
# without convolution in its MLPs, with the same data and schedule. Its logit biases
# belong to a grid of 50x84 tokens, that of an 800x1344 image.
_base_ = ["./retinanet_castling_levit_256_coco.py"]

model = dict(
    backbone=dict(
        img_size=(800, 1344),
        attention=dict(_delete_=True, type="softmax"),
        ffn_conv=0,
    )
)
custom_hooks = []
