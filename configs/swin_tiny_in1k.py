# The local-attention twin of castling_small_in1k.py, about as many parameters and MACs:
# mmpretrain's Swin-T, whose data, epochs, batch of 1,024 and learning rate are the same
# as ours; there as 16 GPUs x 64 images, here as 8 x 128.
_base_ = ["mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py"]

custom_imports = dict(imports=["mmcastling"], allow_failed_imports=False)

data_root = "data/imagenet"
train_dataloader = dict(batch_size=128)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
# A killed run goes on with --resume to the weights that it would have had.
default_hooks = dict(
    checkpoint=dict(type="AtomicCheckpointHook"),
    exact_resume=dict(type="ExactResumeHook"),
)
