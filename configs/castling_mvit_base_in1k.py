# Castling-MViTv2-B on ImageNet-1k with MViTv2's recipe, stochastic depth 0.3 as there.
_base_ = ["./_base_/castling_mvit_in1k.py"]

model = dict(backbone=dict(arch="base", drop_path_rate=0.3))
