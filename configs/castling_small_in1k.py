# Castling-DeiT-S on ImageNet-1k: the recipe of castling_tiny_in1k.py, twice as wide.
_base_ = ["./castling_tiny_in1k.py"]

model = dict(backbone=dict(arch="small"), head=dict(in_channels=384))
