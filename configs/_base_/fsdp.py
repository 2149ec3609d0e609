# Training with parameters, gradients and optimizer states sharded over the processes,
# by torch's FullyShardedDataParallel. Any config adds it as one more base:
#
#   _base_ = ["./mask_rcnn_castling_s_coco.py", "./_base_/fsdp.py"]
#
#   bash tools/dist_train.sh CONFIG 8
#
# The model is one unit: a process gathers all parameters for a step and keeps its share
# of them between steps. Checkpoints are whole, as those of other training, so that
# tools/test.py and tools/convert.py read them, and the norm of clip_grad is that of the
# whole gradient. EMAHook cannot average sharded weights.
runner_type = "FlexibleRunner"
strategy = dict(
    type="FSDPStrategy",
    state_dict_cfg="full",
    model_wrapper=dict(type="MMFullyShardedDataParallel", use_orig_params=True),
)
