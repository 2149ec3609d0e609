# Castling-DeiT-B on ImageNet-1k: the recipe of castling_tiny_in1k.py with what
# mmpretrain adds for DeiT-B, stochastic depth and averaged weights:
#
#   8 GPUs x 128 images, learning rate 5e-4 * 1024 / 512 = 1e-3, 300 epochs of 1,251
#   iterations; momentum 4e-5 averages over 1 / 4e-5 = 25,000 of them, 20 epochs
_base_ = ["./castling_tiny_in1k.py"]

model = dict(backbone=dict(arch="base", drop_path_rate=0.1), head=dict(in_channels=768))
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="EMAHook", momentum=4e-5, priority="ABOVE_NORMAL"),
]
