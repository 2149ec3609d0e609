# Castling-LeViT-128 on ImageNet-1k with LeViT's recipe: distilled for 1000 epochs.
_base_ = ["./_base_/castling_levit_in1k.py"]

model = dict(backbone=dict(arch="128"), head=dict(in_channels=384))
