# Castling-MViTv2-T on ImageNet-1k with MViTv2's recipe.
_base_ = ["./_base_/castling_mvit_in1k.py"]

model = dict(backbone=dict(arch="tiny"))
