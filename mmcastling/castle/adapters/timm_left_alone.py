"""What timm calls attention and castling leaves alone, and why."""

from __future__ import annotations

from mmcastling.castle.adapter_registry import leave_alone

LEFT_ALONE = {
    "channel attention: it mixes channels, at a cost linear in tokens": (
        "timm.models.davit.ChannelAttention",
        "timm.models.davit.ChannelAttentionV2",
        "timm.models.edgenext.CrossCovarianceAttn",
        "timm.models.xcit.XCA",
    ),
    "it gates channels or places, and no token attends to another": (
        "timm.layers.cbam.ChannelAttn",
        "timm.layers.cbam.LightChannelAttn",
        "timm.layers.cbam.LightSpatialAttn",
        "timm.layers.cbam.SpatialAttn",
        "timm.layers.coord_attn.CoordAttn",
        "timm.layers.coord_attn.EfficientLocalAttn",
        "timm.layers.coord_attn.SimpleCoordAttn",
        "timm.layers.coord_attn.StripAttn",
        "timm.layers.selective_kernel.SelectiveKernelAttn",
        "timm.layers.split_attn.SplitAttn",
        "timm.models.csatv2.SpatialAttention",
    ),
    "attention pooling: one query, or a few that are learned": (
        "timm.layers.attention_pool.AttentionPoolLatent",
        "timm.layers.attention_pool.AttentionPoolPrr",
        "timm.layers.attention_pool2d.AttentionPool2d",
        "timm.layers.attention_pool2d.RotAttentionPool2d",
        "timm.models.cait.ClassAttn",
        "timm.models.crossvit.CrossAttention",
        "timm.models.volo.ClassAttention",
    ),
    "already linear in tokens": (
        "timm.layers.lambda_layer.LambdaLayer",
        "timm.models.coat.FactorAttnConvRelPosEnc",
        "timm.models.efficientvit_mit.LiteMLA",
        "timm.models.mobilevit.LinearSelfAttention",
        "timm.models.swiftformer.EfficientAdditiveAttention",
    ),
    "neighbourhoods: each query has keys of its own": (
        "timm.layers.halo_attn.HaloAttn",
    ),
    "convolutional: its weights do not come from keys": (
        "timm.models.nextvit.ConvAttention",
        "timm.models.volo.OutlookAttention",
    ),
    "talking heads: its probabilities are mixed across heads": (
        "timm.models.cait.TalkingHeadAttn",
        "timm.models.efficientformer_v2.Attention2d",
        "timm.models.efficientformer_v2.Attention2dDownsample",
    ),
    "gated positional attention: its probabilities are mixed with positions'": (
        "timm.models.convit.GPSA",
    ),
    "differential attention: a difference of two softmaxes": (
        "timm.layers.diff_attention.DiffAttention",
    ),
    "cascaded heads: each waits for the one before": (
        "timm.models.efficientvit_msra.CascadedGroupAttention",
    ),
    "a single head of keys and values, for all queries' heads": (
        "timm.layers.attention2d.MultiQueryAttention2d",
        "timm.layers.attention2d.MultiQueryAttentionV2",
    ),
    "its keys and values are fewer than its queries (spatially reduced)": (
        "timm.models.cpubone.ConvAttention",
        "timm.models.lowformer.ConvAttention",
    ),
    "it rotates queries and keys along two axes, which no adapter does": (
        "timm.models.gemma4_vit.Gemma4Attention",
    ),
    "it attends with a part of its channels": ("timm.models.shvit.SHSA",),
    "it is one layer with the block's MLP": (
        "timm.models.vision_transformer.ParallelScalingBlock",
        "timm.models.vision_transformer.DiffParallelScalingBlock",
    ),
    "non-local, without softmax of its own or over parts of the map": (
        "timm.layers.non_local_attn.BatNonLocalAttn",
        "timm.layers.non_local_attn.BilinearAttnTransform",
        "timm.layers.non_local_attn.NonLocalAttn",
    ),
}

for _reason, _paths in LEFT_ALONE.items():
    for _path in _paths:
        leave_alone(_path, _reason)
