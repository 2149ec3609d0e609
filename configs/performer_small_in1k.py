# The Performer twin of castling_small_in1k.py: DeiT-S with positive random features in
# place of softmax, another attention that is linear in tokens.
_base_ = ["./softmax_small_in1k.py"]

model = dict(backbone=dict(attention=dict(type="performer")))
