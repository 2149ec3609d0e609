# Castling-ViT-L/16 on ImageNet-1k. DeiT has no L: the recipe of castling_base_in1k.py
# with DeiT III's stochastic depth for it, recomputing layers, and half the batch twice:
#
#   8 GPUs x 64 images x 2 steps of accumulation = 1,024, learning rate 1e-3 as there
_base_ = ["./castling_base_in1k.py"]

model = dict(
    backbone=dict(arch="large", drop_path_rate=0.45, with_cp=True),
    head=dict(in_channels=1024),
)
train_dataloader = dict(batch_size=64)
optim_wrapper = dict(accumulative_counts=2)
