# The softmax twin of castling_small_in1k.py: DeiT-S, without convolution in its MLPs,
# with the same data and schedule. ffn_conv=5 here would leave the attention as the only
# difference.
_base_ = ["./castling_small_in1k.py"]

model = dict(backbone=dict(attention=dict(_delete_=True, type="softmax"), ffn_conv=0))
custom_hooks = []
