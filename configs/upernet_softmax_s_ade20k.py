# The softmax twin of upernet_castling_s_ade20k.py: the same network, data and schedule
# with the attention that castling replaces.
_base_ = ["./upernet_castling_s_ade20k.py"]

model = dict(backbone=dict(attention=dict(_delete_=True, type="softmax")))
custom_hooks = []
