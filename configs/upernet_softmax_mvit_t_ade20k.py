# The softmax twin of upernet_castling_mvit_t_ade20k.py: the published MViTv2-T, without
# convolution in its MLPs, with the same data and schedule. ffn_conv=5 here would leave
# the attention as the only difference.
_base_ = ["./upernet_castling_mvit_t_ade20k.py"]

model = dict(backbone=dict(attention=dict(_delete_=True, type="softmax"), ffn_conv=0))
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "rel_pos_h": dict(decay_mult=0.0),
            "rel_pos_w": dict(decay_mult=0.0),
        }
    )
)
custom_hooks = []
