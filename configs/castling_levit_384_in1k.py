# Castling-LeViT-384 on ImageNet-1k with LeViT's recipe: distilled for 1000 epochs, with
# stochastic depth.
_base_ = ["./_base_/castling_levit_in1k.py"]

model = dict(backbone=dict(arch="384", drop_path_rate=0.1), head=dict(in_channels=768))
